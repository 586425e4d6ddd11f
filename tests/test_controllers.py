"""KL controllers and running moments against TRL 0.11.4's numbers (fixtures/record_trl_core.py)."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.trainer import AdaptiveKLController, FixedKLController, RunningMoments

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_core.json").read_text())


def test_adaptive_kl_controller():
    controller = AdaptiveKLController(0.2, 6.0, 10000.0)
    for current, n_steps, value in RECORDED["kl_controller"]:
        controller.update(current, n_steps)
        assert controller.value == pytest.approx(value, rel=1e-14)


def test_adaptive_kl_controller_by_hand():
    controller = AdaptiveKLController(init_kl_coef=1.0, target=10.0, horizon=100.0)
    controller.update(current=11.0, n_steps=50)  # error 0.1: 1 + 0.1 * 50 / 100
    assert controller.value == pytest.approx(1.05)
    controller.update(current=1000.0, n_steps=50)  # error clipped to 0.2
    assert controller.value == pytest.approx(1.05 * 1.1)


def test_fixed_kl_controller():
    controller = FixedKLController(kl_coef=0.3)
    controller.update(100.0, 5)
    assert controller.value == 0.3


def test_running_moments_match_trl(tmp_path):
    moments = RunningMoments(Accelerator(cpu=True))
    for xs, (batch_mean, batch_std), mean, std, var, count in RECORDED["moments"]:
        # TRL sums in float32
        assert moments.update(torch.tensor(xs)) == pytest.approx((batch_mean, batch_std), rel=1e-6)
        assert (moments.mean, moments.std, moments.var, moments.count) == pytest.approx(
            (mean, std, var, count), rel=1e-6
        )
    assert all(type(value) is float for value in (moments.mean, moments.std, moments.var, moments.count))
    moments.save_to_json(tmp_path / "moments.json")
    assert set(json.loads((tmp_path / "moments.json").read_text())) == {"mean", "std", "var", "count"}
    assert RunningMoments.load_from_json(moments.accelerator, tmp_path / "moments.json") == moments


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=9), min_size=2, max_size=6))
def test_running_moments_are_those_of_everything_seen(batches):
    moments = RunningMoments(Accelerator(cpu=True))
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    everything = torch.tensor(sum(batches, []), dtype=torch.float64)
    assert moments.mean == pytest.approx(everything.mean().item(), abs=1e-9)
    assert moments.std == pytest.approx(everything.std().item(), abs=1e-6)
    assert moments.var == pytest.approx(everything.var(unbiased=False).item(), abs=1e-9)


def test_one_score_leaves_the_deviation_alone():
    """TRL's std turns nan here, and every later scaled score with it."""
    moments = RunningMoments(Accelerator(cpu=True))
    mean, std = moments.update(torch.tensor([2.0]))
    assert mean == 2.0 and math.isnan(std) and moments.std == 1
    moments.update(torch.tensor([4.0]))
    assert moments.std == pytest.approx(math.sqrt(2))


def test_no_scores():
    with pytest.raises(ValueError, match="xs has no element"):
        RunningMoments(Accelerator(cpu=True)).update(torch.tensor([]))
