"""One kernel, one name: whatever is in kernels/ has its C++ source, test and bench under the same name."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
CUDA_ROOMS = ("logprob", "gae", "sampling", "paged_attention")


@pytest.mark.parametrize("name", ROOMS)
def test_room_is_complete(name):
    for path in (f"csrc/cpu/{name}.cpp", f"tests/test_{name}.py", f"bench/bench_{name}.py"):
        assert (ROOT / path).is_file(), f"kernels/{name}.py has no {path}"
    if name in CUDA_ROOMS:
        assert (ROOT / f"csrc/cuda/{name}.cu").is_file(), f"kernels/{name}.py has no csrc/cuda/{name}.cu"
    text = (ROOT / f"kernels/{name}.py").read_text()
    for part in (f"def {name}_reference(", f"def {name}(", "BACKEND_TABLE"):
        assert part in text, f"kernels/{name}.py does not define {part!r}"


def test_kernels_is_no_top_level_package():
    assert not (ROOT / "kernels/__init__.py").exists()
