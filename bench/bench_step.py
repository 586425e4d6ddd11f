"""step() alone on made-up responses: fastppo against TRL 0.11.4. Options and output as bench_loop.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_loop import arguments, synthetic

if __name__ == "__main__":
    synthetic(arguments(__doc__), "bench_step", "step")
