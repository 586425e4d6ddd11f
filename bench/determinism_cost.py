"""What PPOConfig.deterministic costs: seconds of generate and step, off and on, in turns; medians and their ratio.

python -m bench.determinism_cost --model MODEL [--name NAME] [--rounds 9] [--no-csv]
python -m bench.determinism_cost --late [--rounds 9] [--no-csv]       an update of the late trainer (late_loop.py)
Rows go to bench/results/deterministic.csv.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness
from bench_late_loop import WORKER
from bench_loop import Side


def trainer(model: str, deterministic: bool):
    from transformers import AutoTokenizer

    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = PPOConfig(batch_size=32, mini_batch_size=8, ppo_epochs=4, learning_rate=1e-5, deterministic=deterministic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOTrainer(config, AutoModelForCausalLMWithValueHead.from_pretrained(model), None, tokenizer)


def once(made) -> tuple[float, float]:
    queries = [torch.arange(3, 11 + i % 9) for i in range(32)]
    marks = [time.perf_counter()]
    responses = made.generate(queries, return_prompt=False, batch_size=32, max_new_tokens=64, do_sample=True)
    marks.append(time.perf_counter())
    made.step(queries, responses, [r.float().mean() / 500 for r in responses])
    marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--late", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", help="what the rows call the model; the folder's name when not given")
    parser.add_argument("--no-csv", action="store_true")
    options = parser.parse_args()
    if options.late:
        return late(options)
    if options.model is None:
        parser.error("--model or --late is required")
    made = {name: trainer(options.model, name == "on") for name in ("off", "on")}
    for each in made.values():
        once(each)
    seconds = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, each in made.items():
            seconds[name].append(once(each))
    model = options.name or Path(options.model).name
    for stage, what in enumerate(("generate", "step")):
        spent = {name: [row[stage] for row in rows] for name, rows in seconds.items()}
        report(f"{model}: {what}, 32 sequences of 64 new tokens, mini-batch 8, 4 epochs", spent, options)


def late(options: argparse.Namespace) -> None:
    """Two processes that take turns, with a value head and with two backbones."""
    for value_head, what in ((True, "value head"), (False, "two backbones")):
        specs = {name: {"value_head": value_head, "config": {"deterministic": name == "on"}} for name in ("off", "on")}
        sides = {name: Side(name, sys.executable, "fastppo", spec, worker=WORKER) for name, spec in specs.items()}
        for number in range(options.rounds + 1):
            for side in sides.values():
                side.run(keep=number > 0)
        for side in sides.values():
            side.close()
        spent = {name: [result["wall_s"] for result in side.results] for name, side in sides.items()}
        shape = f"GPT-2, 4.6 M, late trainer, {what}: update, 16 sequences of 64 new tokens, mini-batch 4, 4 epochs"
        report(shape, spent, options)


def report(shape: str, seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """seconds: of each round, by "off" and "on"."""
    names = {"off": "off", "on": "fastppo on"}
    medians_ms = {names[name]: 1e3 * statistics.median(spent) for name, spent in seconds.items()}
    note = f"deterministic=True off and on, in turns; median of {options.rounds}"
    told = dict(baseline="off", note=note, csv=not options.no_csv)
    harness.report("deterministic", shape, torch.float32, medians_ms, **told)


if __name__ == "__main__":
    main()
