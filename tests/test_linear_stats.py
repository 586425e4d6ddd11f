"""The fused Triton forward of linear_logprob (kernels/_linear_stats_triton.py), in the interpreter or on a GPU; compiled by test_gpu_compile."""

import pytest
import torch
from logit_cases import tiny_of
from test_linear_logprob import HEADS, inputs

from fastppo.kernels import _linear_stats_triton as fused
from fastppo.kernels._backend import missing
from fastppo.kernels.linear_logprob import Head, linear_logprob

SMALL = {"ROWS": 16, "COLUMNS": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture(params=[True, False], ids=["tma", "pointers"])
def tile(request, device, monkeypatch):
    """On a GPU the real tiles; in the interpreter small ones, and splits of two tiles."""
    if why := missing("triton", device):
        pytest.skip(f"triton: {why}")
    if device.type == "cuda" and request.param and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no TMA before Hopper")
    if device.type == "cpu":
        monkeypatch.setattr(fused, "SPLIT", 64)
        return {"TMA": request.param, **SMALL}
    return fused.TMA_TILE if request.param else fused.TILE


# one token and column; crosses tiles, splits and rows with ragged ends; logits are float32 sums here, so they are as exact as
# float32 products of the same inputs
@pytest.mark.parametrize("shape", [(1, 64, 1), (19, 128, 517)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [True, False])
def test_matches_float64(tile, device, shape, dtype, head, bias):
    hidden_ND, weight_VD, bias_V, tokens_N, *_ = inputs(*shape, device, bias=bias)
    rounded = [x.to(dtype) for x in (hidden_ND, weight_VD / 8)]
    both = []
    for cast, run in ((torch.float64, "reference"), (dtype, "fused")):
        parts = Head(rounded[1].to(cast), None if bias_V is None else bias_V.to(cast), **HEADS[head])
        if run == "fused":
            parts = parts._replace(bias_V=bias_V)
            both.append(fused.fused_forward(rounded[0], parts, tokens_N, temperature=0.7, tile=tile))
        else:
            both.append(linear_logprob(rounded[0].to(cast), parts, tokens_N, temperature=0.7, backend="reference"))
    for truth_N, ours_N in zip(*both, strict=True):
        error, scale = (ours_N.double() - truth_N).abs().max(), truth_N.abs().max().clamp(min=1)
        assert error <= 2e-5 * scale + tiny_of(torch.float32), f"error {error}, largest {scale}"


def test_token_outside_and_rows_of_minus_infinity(tile, device):
    hidden_ND, weight_VD, _, tokens_N, *_ = inputs(4, 64, 100, device, bias=False)
    tokens_N = torch.tensor([100, -1, 5, 99], device=device)
    bias_V = torch.zeros(100, device=device)
    bias_V[99] = -torch.inf
    head = Head(weight_VD.bfloat16(), bias_V)
    logprob_N, entropy_N = fused.fused_forward(hidden_ND.bfloat16(), head, tokens_N, tile=tile)
    assert logprob_N.isnan().tolist() == [True, True, False, False] and logprob_N[3] == -torch.inf
    assert entropy_N.isfinite().all()
    logprob_N, entropy_N = fused.fused_forward(
        hidden_ND.bfloat16(), head._replace(bias_V=bias_V.fill_(-torch.inf)), tokens_N, tile=tile
    )
    assert logprob_N.isnan().all() and entropy_N.isnan().all()


def test_a_row_does_not_depend_on_its_batch(tile, device):
    hidden_ND, weight_VD, _, tokens_N, *_ = inputs(20, 64, 300, device, bias=False)
    head = Head(weight_VD.bfloat16())
    together = fused.fused_forward(hidden_ND.bfloat16(), head, tokens_N, tile=tile)
    alone = fused.fused_forward(hidden_ND[17:18].bfloat16(), head, tokens_N[17:18], tile=tile)
    assert all(torch.equal(a, b[17:18]) for a, b in zip(alone, together, strict=True))


def test_a_hidden_size_that_does_not_fit_raises(tile, device):
    hidden_ND, weight_VD, _, tokens_N, *_ = inputs(2, 13, 30, device, bias=False)
    with pytest.raises(ValueError, match=r"a hidden size that is a multiple of \d+; got 13"):
        fused.fused_forward(hidden_ND.bfloat16(), Head(weight_VD.bfloat16()), tokens_N, tile=tile)
