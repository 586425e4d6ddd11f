"""fastppo's steps against the numbers that TRL 0.11.4 gave for the same models, batches and shuffles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden_cases
import numpy as np
import pytest
from golden_cases import CASES, compared

import fastppo

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "tests/golden/ppo.json").read_text())["cases"]
# TRL's own numbers where we differ on purpose (docs/differences.md)
DEFECTS = ("max_grad_norm", "gpt2_left", "whiten", "masks_whiten")
# a key bias shifts all scores of a query alike, so its gradient is rounding noise, which Adam scales up to full steps
KEY_BIASES = ("c_attn.bias", "k_proj.bias")


def worst_difference(case: dict, ours: list[dict], theirs: list[dict]) -> tuple[float, str]:
    """Largest difference in units of (1e-3 relative + 1e-4 absolute), and where. Parameters: 1e-3 absolute."""
    worst = (0.0, "")
    for step, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        assert set(got["stats"]) == set(want["stats"])
        for name, value in want["stats"].items():
            assert np.shape(got["stats"][name]) == np.shape(value), f"{name}: shape"
            a, b = (compared(case, step, name, x) for x in (got["stats"][name], value))
            assert (np.isnan(a) == np.isnan(b)).all(), name
            error = np.nan_to_num(np.abs(a - b) / (1e-3 * np.abs(b) + 1e-4)).max(initial=0.0)
            worst = max(worst, (float(error), f"step {step} {name}: {a.flatten()[:3]} TRL {b.flatten()[:3]}"))
        assert set(got["parameters"]) == set(want["parameters"])
        for name, value in want["parameters"].items():
            if name.endswith(KEY_BIASES):
                continue
            error = np.abs(np.array(got["parameters"][name]) - value).max() / 1e-3
            worst = max(worst, (float(error), f"step {step} parameter {name}"))
        worst = max(worst, (abs(got["kl_coef"] - want["kl_coef"]) / 1e-6, f"step {step} kl_coef"))
    return worst


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in DEFECTS and not name.endswith("_mended")])
def test_same_numbers_as_trl(name, packed):
    ours = golden_cases.run(fastppo, CASES[name], packed=packed)
    worst, where = worst_difference(CASES[name], ours, RECORD[name])
    assert worst <= 1, f"{worst:.3g} times the tolerance: {where}"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", DEFECTS)
def test_defects_of_trl_are_not_copied(name, packed):
    ours = golden_cases.run(fastppo, CASES[name], packed=packed)
    copied, _ = worst_difference(CASES[name], ours, RECORD[name])
    mended, where = worst_difference(CASES[name], ours, RECORD[f"{name}_mended"])
    assert copied > 3, "TRL's own numbers came out"
    assert mended <= 1, f"{mended:.3g} times the tolerance: {where}"


@pytest.mark.parametrize("budget", [1, 20, 40])
def test_micro_batches_change_nothing(budget):
    ours = golden_cases.run(fastppo, CASES["accumulation"], max_tokens_per_micro_batch=budget)
    worst, where = worst_difference(CASES["accumulation"], ours, RECORD["accumulation"])
    assert worst <= 1, f"{worst:.3g} times the tolerance: {where}"


@pytest.mark.parametrize("name", ["basic", "kl_full_whiten", "minibatches"])
def test_recorded_steps_of_stories260k(shared, name):
    script = shared / "tools/check_golden.py"
    command = [sys.executable, script, "fastppo", shared / "models/stories260K", shared / f"golden/{name}.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("ok"), done.stdout
