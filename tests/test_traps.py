"""Traps that no single room's file can test: sizes of 32 bits in the sources, grids, the current GPU, tuning.

The rooms' own traps are in their own files; CONTRIBUTING.md has the table (test_docs.py looks whether its tests exist).
"""

import re
import shutil
import subprocess
import sysconfig
from functools import partial
from pathlib import Path

import pybind11
import pytest
import torch

from fastppo.kernels import (
    _backend,
    _tickets,
    gae,
    kl_reward,
    linear_logprob,
    linear_ppo_loss,
    logprob,
    paged_attention,
    ppo_loss,
    sampling,
)
from fastppo.kernels._backend import INTERPRET, missing, pick
from fastppo.kernels._tickets import ticket

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process is for Triton")
MANY = 70_000  # rows: past the 65,535 of a CUDA grid's second and third dimension, and past 16 bits


# --- more than 2^31 elements, where no test can have the memory: every room that takes contiguous tensors only ---


def narrowings(source: Path) -> list[str]:
    """Where the C++ compiler sees a 64-bit number become a 32-bit one without a cast. CUDA sources by tests/cuda_host's headers."""
    folders = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [shutil.which("g++"), "-std=c++17", "-fsyntax-only", "-Wconversion", "-Wno-psabi", "-fopenmp"]
    if source.suffix == ".cu":
        folders += [ROOT / "tests/cuda_host", ROOT / "csrc/cuda"]
        command += ["-x", "c++", "-DFASTPPO_CUDA", "-DFASTPPO_CUDA_HOST"]
    ran = subprocess.run([*command, *(f"-I{folder}" for folder in folders), source], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = re.findall(r"[^\n]*conversion from [^\n]*(?:int64_t|long)[^\n]* to [^\n]*int[^\n]*", ran.stderr)
    return [line for line in found if "tests/cuda_host/" not in line]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, whose -Wconversion this reads")
@pytest.mark.parametrize("name", ["cpu/kl_reward.cpp", "cpu/gae.cpp", "cpu/ppo_loss.cpp", "cuda/*.cu"])
def test_no_size_becomes_32_bits(name):
    for source in sorted((ROOT / "csrc").glob(name)):
        assert not narrowings(source)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, whose -Wconversion this reads")
def test_the_compiler_sees_a_size_that_becomes_32_bits(tmp_path):
    (tmp_path / "bad.cpp").write_text("#include <cstdint>\nint offset(int64_t row, int64_t T) { return row * T; }\n")
    assert len(narrowings(tmp_path / "bad.cpp")) == 1


# --- more rows than a grid's y and z take ---


def test_cuda_grids_have_one_dimension():
    """What is launched as <<<grid>>>: one number, or a dim3 of one. (Triton's grids: test_host_waits.py looks at every launch.)"""
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        text = re.sub(r"#define FASTPPO_LAUNCH.*", "", source.read_text())
        grids = re.findall(r"FASTPPO_LAUNCH\(\s*(\w+(?:<unsigned>\([^;]*?\))?),", text)
        assert len(grids) == text.count("FASTPPO_LAUNCH("), source.name
        for grid in grids:
            declared = re.search(rf"dim3 {grid}\(([^;]*)\);", text)
            assert grid.startswith("static_cast<unsigned>(") or (declared and "," not in declared[1]), (
                source.name,
                grid,
            )
        assert not re.search(r"blockIdx\.[yz]", text), source.name


def many_rows() -> dict:
    """room -> call(backend) on 70,000 rows."""
    torch.manual_seed(0)
    logits_NV, hidden_ND, weight_VD = torch.randn(MANY, 3), torch.randn(MANY, 2), torch.randn(3, 2)
    tokens_N, numbers_N = torch.randint(0, 3, (MANY,)), torch.randn(6, MANY)
    batch, head = ppo_loss.PPOBatch(*numbers_N[:4]), linear_logprob.Head(weight_VD)
    one_BT, ones_BT = numbers_N[:3, :, None].contiguous(), torch.ones(MANY, 1, dtype=torch.bool)
    caches = torch.randn(2, 2, 16, 1, 8)
    tables_B1, lens_B = torch.ones(MANY, 1, dtype=torch.int32), torch.full((MANY,), 2, dtype=torch.int32)
    options = ppo_loss.PPOLossOptions()
    return {
        "logprob": lambda b: logprob.logprob(logits_NV, tokens_N, backend=b),
        "linear_logprob": lambda b: linear_logprob.linear_logprob(hidden_ND, head, tokens_N, backend=b),
        "linear_ppo_loss": lambda b: [
            linear_ppo_loss.linear_ppo_loss(hidden_ND, numbers_N[4], head, tokens_N, batch, options, backend=b).loss
        ],
        "ppo_loss": lambda b: [ppo_loss.ppo_loss(*numbers_N[4:], batch, options, backend=b).loss],
        "gae": lambda b: gae.gae(one_BT[0], one_BT[1], ones_BT, gamma=0.9, lam=0.9, backend=b)[:2],
        "kl_reward": lambda b: kl_reward.kl_reward(*one_BT[:2], ones_BT, numbers_N[3], kl_coef=0.1, backend=b),
        "sampling": lambda b: [sampling.sampling(logits_NV, tokens_N, tokens_N, backend=b).logprob_B],
        "paged_attention": lambda b: [
            paged_attention.paged_attention(
                hidden_ND.repeat(1, 4)[:, None], *caches, tables_B1, lens_B, scale=0.3, backend=b
            )
        ],
    }


def test_more_rows_than_a_grid_dimension():
    if why := missing("cpu", torch.device("cpu")):
        pytest.skip(why)
    for name, run in many_rows().items():
        if name == "paged_attention":  # its reference goes sequence by sequence
            assert run("cpu")[0].shape == (MANY, 1, 8) and run("cpu")[0][-1].abs().max() > 0
            continue
        for ours, theirs in zip(run("cpu"), run("reference"), strict=True):
            torch.testing.assert_close(
                ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


# --- tensors on another GPU than the current one ---


class Current:
    """Stands in for torch.cuda's notion of the current device; `seen` has it at every launch."""

    def __init__(self, monkeypatch, index: int):
        self.index, self.seen = index, []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)
        monkeypatch.setattr(torch.cuda, "device", partial(Switched, self))
        monkeypatch.setattr(_backend, "missing", lambda backend, device: None)

    def launch(self, *args, **kwargs):
        self.seen.append(self.index)
        return args, kwargs


class Switched:
    def __init__(self, current: Current, device: torch.device):
        self.current, self.device = current, device

    def __enter__(self):
        self.before, self.current.index = self.current.index, self.device.index

    def __exit__(self, *error):
        self.current.index = self.before


@pytest.mark.parametrize("asked", [None, "triton"])
def test_a_launch_goes_to_its_tensors_gpu(monkeypatch, asked):
    """Triton and CUDA launch on the current GPU, whatever the tensors lie on: every room's launcher comes from pick()."""
    monkeypatch.delenv("FASTPPO_BACKEND", raising=False)
    current = Current(monkeypatch, index=0)
    for index in (0, 1, 2):
        run = pick("gae", {"triton": current.launch}, torch.device("cuda", index), asked)
        assert run(3, key=4) == ((3,), {"key": 4})
    assert current.seen == [0, 1, 2] and current.index == 0


def test_every_room_asks_pick():
    for path in sorted((ROOT / "kernels").glob("[!_]*.py")):
        assert re.search(rf'pick\("{path.stem}", BACKEND_TABLE, \w+(\.device)?, backend\)', path.read_text()), path.name


def test_a_captured_launch_keeps_no_counter(monkeypatch):
    """What is made during a capture is zero after a replay only; a later launch that found it would never see its last block."""
    device, capturing = torch.device("cuda", 0), [True]
    monkeypatch.setattr(_tickets, "_KEPT", {})
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kw: object())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    captured = [ticket(device, 7) for _ in range(2)]
    capturing[0] = False
    eager = [ticket(device, stream) for stream in (7, 7, 8)]
    assert captured[0] is not captured[1] and eager[0] is eager[1] is not eager[2] and eager[0] not in captured
    capturing[0] = True
    assert ticket(device, 7) is eager[0], "warmed up on the capture's own stream: no fill in the graph"


# --- tuning ---


def test_no_kernel_tunes_itself():
    """Tuning runs a kernel several times: one that overwrites its input (inplace_backward) would corrupt it."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        assert not re.search(r"autotune|heuristics", path.read_text()), path.name


# --- CONTRIBUTING.md's table ---


def test_every_trap_has_its_tests():
    """A test that is named in a room's column is in that room's file, or in one that holds for all rooms; no cell is left empty."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    (_, *columns), rows = rows[0], rows[2:]
    everywhere = ["traps", "host_waits", "gpu_compile"]
    assert len(rows) >= 20
    for trap, *cells in rows:
        assert len(cells) == len(columns) and all(cells), trap
        for column, cell in zip(columns, cells, strict=True):
            names = re.findall(r"`(test_\w+)`", cell)
            assert names or re.search(r"`tests/\w+\.py`", cell) or cell in ("-", "same", "float32 only"), (trap, column)
            files = [ROOT / f"tests/test_{room}.py" for room in [*column.split(", "), *everywhere]]
            sources = "".join(path.read_text() for path in files)
            for name in names:
                assert f"def {name}(" in sources, f"{trap}: {name} is not in {[path.name for path in files]}"
