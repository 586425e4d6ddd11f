import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import MASKS, assert_as_exact_as_torch, examples, make_mask, masks, sizes, trl_numbers

from fastppo.kernels.ppo_loss import STATS, PPOBatch, PPOLossOptions, PPOStats, ppo_loss

ROOT = Path(__file__).parent.parent


def inputs(N, mask_kind, device, seed=0):
    """logprobs, values, entropy and the batch: ratios and value moves on both sides of the clip ranges."""
    generator = torch.Generator().manual_seed(seed * 7919 + N)
    draw = lambda: torch.randn(N, generator=generator)  # noqa: E731
    old_logprobs_N, old_values_N, advantages_N, returns_N = draw() - 2, draw(), draw(), draw()
    logprobs_N, values_N, entropy_N = old_logprobs_N + 0.3 * draw(), old_values_N + 0.3 * draw(), draw() ** 2
    mask_N = None if mask_kind == "no mask" else make_mask(mask_kind, 1, N, generator)[0]
    batch = PPOBatch(old_logprobs_N, old_values_N, advantages_N, returns_N, mask_N)
    batch = PPOBatch(*(None if x is None else x.to(device) for x in batch))
    return logprobs_N.to(device), values_N.to(device), entropy_N.to(device), batch


def outcome(logprobs_N, values_N, entropy_N, batch, options, *, dtype, backend, upstream=1.0, **kw):
    """[loss, sums, d loss / d logprobs, values, entropy] in `dtype`."""
    cast = lambda x: x.to(dtype) if x is not None and x.is_floating_point() else x  # noqa: E731
    leaves = [cast(x).detach().clone().requires_grad_() for x in (logprobs_N, values_N, entropy_N)]
    made = ppo_loss(*leaves[:2], PPOBatch(*map(cast, batch)), options, entropy_N=leaves[2], backend=backend, **kw)
    (made.loss * upstream).backward()
    sums = torch.tensor(list(made.stats.sums().values()), dtype=torch.float64)
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [made.loss.detach(), sums, *grads]


NAMES = ("loss", "stats", "d logprob", "d value", "d entropy")


def check(backend, device, arguments, options, **kw):
    truth = outcome(*arguments, options, dtype=torch.float64, backend="reference", **kw)
    plain = outcome(*arguments, options, dtype=torch.float32, backend="reference", **kw)
    ours = outcome(*arguments, options, dtype=torch.float32, backend=backend, **kw)
    for name, o, p, t in zip(NAMES, ours, plain, truth, strict=True):
        assert_as_exact_as_torch(name, o, p, t)


@settings(deadline=None, max_examples=examples(25))
@given(
    N=sizes,
    mask_kind=st.one_of(masks, st.just("no mask")),
    dual_clip=st.sampled_from([None, 1.2, 3.0]),
    whiten=st.sampled_from([None, (0.3, 1.7)]),
    normalizer=st.sampled_from([None, 37.0]),
    seed=st.integers(0, 99),
)
def _matches(backend, device, N, mask_kind, dual_clip, whiten, normalizer, seed):
    options = PPOLossOptions(dual_clip=dual_clip, entropy_coef=0.01, vf_coef=0.5)
    check(
        backend,
        device,
        inputs(N, mask_kind, device, seed),
        options,
        whiten=whiten,
        normalizer=normalizer,
        upstream=-1.5,
    )


def test_matches_reference(backend, device):
    _matches(backend, device)


def test_crosses_chunks_and_takes_tensors(backend, device):
    """10,000 tokens are three chunks of 4096 and ten blocks; whiten and normalizer as tensors cost no wait on a GPU."""
    arguments = inputs(10_000, "holes", device)
    whiten_2, normalizer = torch.tensor([0.3, 1.7], device=device), torch.tensor(512.0, device=device)
    check(backend, device, arguments, PPOLossOptions(), whiten=whiten_2, normalizer=normalizer)


def test_hand_worked(backend, device):
    """Three tokens by hand: a ratio of 1.5 clipped at 1.2 with A = 2; a ratio of 1; a False token full of NaN."""
    nan = float("nan")
    logprobs_N = torch.tensor([1.5, 1.0, nan], device=device).log().requires_grad_()
    values_N = torch.tensor([1.0, 0.5, nan], device=device, requires_grad=True)
    batch = PPOBatch(
        *torch.tensor([[0.0, 0.0, nan], [0.0, 0.5, nan], [2.0, -1.0, nan], [1.0, 1.5, nan]], device=device),
        torch.tensor([True, True, False], device=device),
    )
    loss, stats = ppo_loss(logprobs_N, values_N, batch, PPOLossOptions(vf_coef=0.1), backend=backend)
    loss.backward()
    # policy: -2 * 1.2 and +1; value: max(0, (0.2 - 1)^2) / 2 = 0.32 and 1 / 2
    assert loss.item() == pytest.approx(((-2.4 + 1.0) + 0.1 * (0.32 + 0.5)) / 2)
    assert logprobs_N.grad.tolist() == pytest.approx([0.0, 0.5, 0.0])
    assert values_N.grad.tolist() == pytest.approx([0.0, 0.1 * (0.5 - 1.5) / 2, 0.0])
    means = stats.means()
    assert means["policy_clipped"] == 0.5 and means["value_clipped"] == 0.5 and means["ratio_max"] == pytest.approx(1.5)
    assert means["return_var"] == pytest.approx(0.125) and means["value_error"] == pytest.approx(0.5)


def test_dual_clip_by_hand(backend, device):
    """A = -1 and ratio 4: the loss stops at 3 and so does the gradient; at ratio 2 it does not."""
    logprobs_N = torch.tensor([4.0, 2.0], device=device).log().requires_grad_()
    zero_N = torch.zeros(2, device=device)
    batch = PPOBatch(zero_N, zero_N, zero_N - 1, zero_N)
    loss, stats = ppo_loss(logprobs_N, zero_N, batch, PPOLossOptions(dual_clip=3.0), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(2.5) and logprobs_N.grad.tolist() == pytest.approx([0.0, 1.0])
    assert stats.sums()["dual_clipped"] == 1


def test_every_statistic_of_trl(backend, device):
    """TRL 0.11.4's loss() on [4, 9] tokens with holes in the mask: its numbers, from PPOStats.means()."""
    trl = trl_numbers()
    tensor = lambda x: torch.tensor(x, dtype=torch.float32, device=device)  # noqa: E731
    mask_BT = torch.tensor(trl["mask"], device=device).bool()
    gae = trl["gae_plain"]
    recorded = trl["loss"]
    batch = PPOBatch(
        tensor(trl["logprobs"]), tensor(trl["values"]), tensor(gae["advantages"]), tensor(gae["returns"]), mask_BT
    )
    options = PPOLossOptions(recorded["cliprange"], recorded["cliprange_value"], recorded["vf_coef"])
    logprobs_BT, values_BT = tensor(recorded["new"]).requires_grad_(), tensor(recorded["vpred"]).requires_grad_()
    entropy_BT = tensor(recorded["entropy"])
    loss, stats = ppo_loss(logprobs_BT, values_BT, batch, options, entropy_N=entropy_BT, backend=backend)
    loss.backward()
    mean = stats.means()
    names = {
        "loss/policy": "policy_loss",
        "loss/value": "value_loss",
        "policy/entropy": "entropy",
        "policy/approxkl": "approx_kl",
        "policy/policykl": "policy_kl",
        "policy/clipfrac": "policy_clipped",
        "policy/advantages_mean": "advantage",
        "returns/mean": "return",
        "returns/var": "return_var",
        "val/vpred": "value",
        "val/error": "value_error",
        "val/clipfrac": "value_clipped",
        "val/mean": "old_value",
        "val/var": "old_value_var",
    }
    for theirs, ours in names.items():
        assert mean[ours] == pytest.approx(recorded["stats"][theirs], rel=2e-6, abs=3e-7), theirs
    assert loss.item() == pytest.approx(recorded["stats"]["loss/total"], rel=1e-5)
    torch.testing.assert_close(logprobs_BT.grad, tensor(recorded["grad_logprob"]), atol=2e-7, rtol=1e-5)
    torch.testing.assert_close(values_BT.grad, tensor(recorded["grad_value"]), atol=2e-7, rtol=1e-5)


def test_micro_batches_add_up(backend, device):
    """Loss, gradients and statistics of three unequal micro-batches with the mini-batch's normalizer are the whole's."""
    logprobs_N, values_N, entropy_N, batch = inputs(1000, "holes", device)
    options, count = PPOLossOptions(), float(batch.mask_N.sum())
    whole = ppo_loss(logprobs_N, values_N, batch, options, backend=backend)
    loss, stats = 0.0, PPOStats(())
    for part in (slice(0, 100), slice(100, 850), slice(850, 1000)):
        some = PPOBatch(*(x[part] for x in batch))
        made = ppo_loss(logprobs_N[part], values_N[part], some, options, normalizer=count, backend=backend)
        loss, stats = loss + made.loss, stats + made.stats
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, value in whole.stats.sums().items():
        assert stats.sums()[name] == pytest.approx(value, rel=2e-5, abs=1e-4), name


def test_variance_far_from_zero(backend, device):
    """Returns of 1000 +- 0.1: a sum of squares in float32 would lose the variance altogether."""
    logprobs_N, values_N, _, batch = inputs(3000, "full", device)
    batch = batch._replace(returns_N=1000 + 0.1 * batch.returns_N)
    stats = ppo_loss(logprobs_N, values_N, batch, PPOLossOptions(), backend=backend).stats
    truth = batch.returns_N.double().var().item()
    assert stats.means()["return_var"] == pytest.approx(truth, rel=1e-3)


def test_gradcheck(device):
    logprobs_N, values_N, entropy_N, batch = inputs(7, "holes", device)
    batch = PPOBatch(*(x.double() if x.is_floating_point() else x for x in batch))
    options = PPOLossOptions(dual_clip=1.5, entropy_coef=0.1)
    loss = lambda l, v, e: ppo_loss(l, v, batch, options, entropy_N=e, backend="reference").loss  # noqa: E731
    leaves = [x.double().requires_grad_() for x in (logprobs_N, values_N, entropy_N)]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("N", [0, 1])
def test_no_tokens(backend, device, N):
    """Zero tokens, or one that does not count: loss 0, gradients 0, all statistics 0, no NaN."""
    mask_N = torch.zeros(N, dtype=torch.bool, device=device)
    x_N = torch.full((N,), 3.0, device=device, requires_grad=True)
    y_N = torch.full((N,), 3.0, device=device)
    loss, stats = ppo_loss(x_N, y_N, PPOBatch(y_N, y_N, y_N, y_N, mask_N), PPOLossOptions(), backend=backend)
    loss.backward()
    assert loss.item() == 0 and not x_N.grad.any() and set(stats.means().values()) == {0.0}


def test_strided_inputs_and_expanded_upstream_gradient(backend, device):
    """[B, T + 1][:, :-1] views, and a gradient that arrives with stride 0."""
    wide = [torch.randn(3, 38, device=device) for _ in range(6)]
    logprobs_BT, values_BT, *rest = (x[:, :-1] for x in wide)
    leaf_BT = logprobs_BT.detach().requires_grad_()
    made = ppo_loss(leaf_BT, values_BT, PPOBatch(*rest), PPOLossOptions(), backend=backend).loss
    made.expand(5).sum().backward()
    dense_BT = logprobs_BT.contiguous().requires_grad_()
    batch = PPOBatch(*(x.contiguous() for x in rest))
    (5 * ppo_loss(dense_BT, values_BT.contiguous(), batch, PPOLossOptions(), backend=backend).loss).backward()
    torch.testing.assert_close(leaf_BT.grad, dense_BT.grad)


def test_retained_and_double_backward(backend, device):
    """A retained graph gives the same gradient again; a second derivative is refused, not wrong."""
    if backend == "reference":
        pytest.skip("plain PyTorch has second derivatives")
    logprobs_N, values_N, _, batch = inputs(20, "full", device)
    logprobs_N.requires_grad_()
    loss = ppo_loss(logprobs_N, values_N, batch, PPOLossOptions(), backend=backend).loss
    first, second = (torch.autograd.grad(loss, logprobs_N, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="ppo_loss: its backward has no derivative"):
        torch.autograd.grad(loss, logprobs_N, create_graph=True)


def test_same_bits_every_time(backend, device):
    """Twice the same call, the same bits; on a CPU with one thread and with two as well."""
    arguments = inputs(20_000, "holes", device)
    made = []
    threads = torch.get_num_threads()
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        made.append(outcome(*arguments, PPOLossOptions(), dtype=torch.float32, backend=backend))
    torch.set_num_threads(threads)
    if backend != "reference":  # plain torch's sums depend on the number of threads
        assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(made[1], made[2], strict=True))


def test_bad_input_says_what_came(device):
    x_N, y_N = torch.zeros(4, device=device), torch.zeros(5, device=device)
    good = PPOBatch(x_N, x_N, x_N, x_N)
    with pytest.raises(ValueError, match=r"ppo_loss: returns_N must be of shape \(4,\).*got \(5,\)"):
        ppo_loss(x_N, x_N, good._replace(returns_N=y_N), PPOLossOptions())
    with pytest.raises(ValueError, match=r"mask_N must be torch.bool.*got torch.int64"):
        ppo_loss(x_N, x_N, good._replace(mask_N=x_N.long()), PPOLossOptions())
    with pytest.raises(ValueError, match="entropy_coef is 0.1 but entropy_N is None"):
        ppo_loss(x_N, x_N, good, PPOLossOptions(entropy_coef=0.1))
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        ppo_loss(x_N, x_N, good, PPOLossOptions(dual_clip=0.5))
    with pytest.raises(RuntimeError, match="ppo_loss: backend 'cuda' was asked for but ppo_loss has only"):
        ppo_loss(x_N, x_N, good, PPOLossOptions(), backend="cuda")


def test_float64_is_the_references_alone():
    """No Triton here: a fused back end must say that it is float32 only, whichever would have been picked."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter's process never picks a back end by itself")
    x_N = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="logprobs_N must be torch.float32, got torch.float64.*reference"):
        ppo_loss(x_N, x_N, PPOBatch(x_N, x_N, x_N, x_N), PPOLossOptions(), backend="cpu")


def test_masks_cover_the_kinds():
    generator = torch.Generator().manual_seed(0)
    assert {make_mask(kind, 4, 9, generator).dtype for kind in MASKS} == {torch.bool} and len(STATS) == 18


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None\nimport fastppo.kernels.ppo_loss as p\nassert p.BACKEND_TABLE"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["logprobs", "values", "old_logprobs", "advantages", "returns"])
def test_nan_is_not_hidden(backend, device, name):
    """Neither clamp nor max may swallow it: the trainer's guard against NaN looks at the loss and the gradients."""
    torch.manual_seed(0)
    x = {
        key: torch.randn(6, device=device) for key in ("logprobs", "values", "old_logprobs", "old_values", "advantages")
    }
    x["returns"] = torch.randn(6, device=device)
    x[name][3] = torch.nan
    logprobs_N, values_N = (x[key].requires_grad_() for key in ("logprobs", "values"))
    batch = PPOBatch(x["old_logprobs"], x["old_values"], x["advantages"], x["returns"])
    loss = ppo_loss(logprobs_N, values_N, batch, PPOLossOptions(), backend=backend).loss
    gradient_N = torch.autograd.grad(loss, values_N if name in ("values", "returns") else logprobs_N)[0]
    assert loss.isnan() and gradient_N.isnan().tolist() == [False, False, False, True, False, False]
