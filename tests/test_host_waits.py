"""No kernel room makes the host wait for a GPU on its way, but where it says so. Runs the GPU launchers on CPU tensors, with the
launches themselves left out; what the host decides from (how many rows have a gradient) is given."""

from functools import partial

import pytest
import torch
from host_waits import HostWait, NoWaits, Nowhere

from fastppo.kernels import (
    _logit_rows,
    _paged_attention_launch,
    _ppo_chunk,
    _sampling_gpu,
    gae,
    kl_reward,
    linear_logprob,
    linear_ppo_loss,
    logprob,
    paged_attention,
    ppo_loss,
    sampling,
)

KERNELS = {
    _logit_rows: ("stats_kernel", "grad_kernel"),
    gae: ("gae_kernel",),
    kl_reward: ("_kl_reward_kernel",),
    ppo_loss: ("ppo_loss_kernel",),
    _sampling_gpu: ("sampling_kernel",),
    _paged_attention_launch: ("paged_attention_kernel", "merge_kernel", "cache_write_kernel"),
}
N, D, V = 6, 4, 50


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Every Triton kernel, launched into nothing."""
    pytest.importorskip("triton", reason="triton is not installed")
    target = Nowhere()
    for room, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(room, name, target)
    yield target
    assert all(len(grid) == 1 for grid in target.grids), "a grid's second and third dimension end at 65,535"


def rows():
    torch.manual_seed(0)
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.randint(0, V, (N,))


def floats(count, *shape):
    return torch.randn(count, *shape).unbind()


def run_logprob(run):
    hidden_ND, weight_VD, tokens_N = rows()
    made = run((hidden_ND @ weight_VD.t()), tokens_N, 1.0, False)
    torch.autograd.backward(made, [torch.ones(()).expand(N), torch.ones(N)])


def test_logprob(nowhere):
    cuda = logprob._run(logprob.c_launcher(lambda: nowhere, "cuda_", lambda: (0,)))
    with NoWaits():
        run_logprob(logprob.BACKEND_TABLE["triton"])
        run_logprob(cuda)
    assert nowhere.launches == 4


def test_linear_logprob(nowhere, monkeypatch):
    waited = []
    monkeypatch.setattr(linear_logprob, "live_rows", lambda live_N, flops: waited.append(flops))
    hidden_ND, weight_VD, tokens_N = rows()
    head = linear_logprob.Head(weight_VD, torch.zeros(V, requires_grad=True))
    with NoWaits():
        made = linear_logprob.BACKEND_TABLE["triton"](hidden_ND, head, tokens_N, 1.0)
        torch.autograd.backward(made, [torch.ones(N), torch.ones(N)])
    assert nowhere.launches >= 2 and waited == [6 * V * D]


def ppo_batch(mask_N=None):
    return ppo_loss.PPOBatch(*floats(4, N), mask_N)


@pytest.mark.parametrize(("live", "moves"), [(N, 0), (3, 2), (0, 0)])
def test_linear_ppo_loss(nowhere, monkeypatch, live, moves):
    order = []
    monkeypatch.setattr(_ppo_chunk.ToHost, "read", lambda self: order.append(nowhere.launches) or [live, moves])
    hidden_ND, weight_VD, tokens_N = rows()
    values_N, head = torch.zeros(N, requires_grad=True), linear_logprob.Head(weight_VD)
    options = dict(temperature=1.0, normalizer=None, whiten=torch.tensor([0.0, 1.0]))
    with NoWaits():
        run = linear_ppo_loss.BACKEND_TABLE["triton"]
        # by the table's "triton", and not by a device: the launcher picks the reference's ppo_loss on a CPU
        monkeypatch.setattr(_ppo_chunk, "ppo_loss", lambda *a, backend, **k: ppo_loss.BACKEND_TABLE["triton"](*a, **k))
        run(hidden_ND, values_N, head, tokens_N, ppo_batch(), ppo_loss.PPOLossOptions(), **options)
    assert order == [3], "the only wait comes after statistics, loss and gradient were launched"


def test_linear_ppo_loss_waits_once_for_a_mask(nowhere):
    hidden_ND, weight_VD, tokens_N = rows()
    batch, head = ppo_batch(torch.ones(N, dtype=torch.bool)), linear_logprob.Head(weight_VD)
    run = partial(linear_ppo_loss.BACKEND_TABLE["triton"], temperature=1.0, normalizer=None, whiten=None)
    with pytest.raises(HostWait, match="nonzero"), NoWaits():
        run(hidden_ND, torch.zeros(N), head, tokens_N, batch, ppo_loss.PPOLossOptions())


@pytest.mark.parametrize("whiten", [None, (0.0, 1.0), (torch.zeros(()), torch.ones(())), torch.tensor([0.0, 1.0])])
@pytest.mark.parametrize("normalizer", [None, 3.0, torch.tensor(3.0)])
def test_ppo_loss(nowhere, whiten, normalizer):
    logprobs_N, values_N, entropy_N = (x.requires_grad_() for x in floats(3, N))
    for mask_N in (None, torch.ones(N, dtype=torch.bool)):
        with NoWaits():
            made = ppo_loss.BACKEND_TABLE["triton"](
                *(logprobs_N, values_N, ppo_batch(mask_N), ppo_loss.PPOLossOptions(entropy_coef=0.1)),
                **dict(entropy_N=entropy_N, normalizer=normalizer, whiten=whiten),
            )
            made.loss.backward()
    assert nowhere.launches == 2


@pytest.mark.parametrize("packed", [False, True])
def test_gae_and_kl_reward(nowhere, packed):
    mask_BT = torch.ones(2, 8, dtype=torch.bool)
    tensors = [*floats(3, 2, 8), mask_BT]
    starts = torch.tensor([0, 8, 16], dtype=torch.int32) if packed else None
    if packed:
        tensors = [x.flatten() for x in tensors]
    x = gae._Inputs(None, *tensors, torch.zeros(2), starts)
    launchers = (gae.BACKEND_TABLE["triton"], partial(gae._launch_cuda, module=nowhere, stream=0))
    with NoWaits():
        for launch in launchers:
            advantages, *_, moments_3 = launch(x, gae.ShapedGAEOptions())
            gae.whitening(gae.GAE(advantages, advantages, moments_3).sums)
        options = dict(kl_coef=0.1, kind="k3", full_kl_BT=None)
        kl_reward.BACKEND_TABLE["triton"](*floats(2, 2, 8), mask_BT, torch.zeros(2), **options)
    assert nowhere.launches == 3


OPTIONS = sampling.SamplingOptions(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)


def test_sampling(nowhere):
    history = sampling.History(torch.randint(0, V, (N, 3)), torch.rand(N, 3) < 0.5)
    args = (torch.randn(N, V), torch.arange(N), torch.arange(N), OPTIONS, history, torch.zeros(N, V, dtype=torch.bool))
    with NoWaits():
        sampling.BACKEND_TABLE["triton"](*args)
        _sampling_gpu.sampling_cuda_on(nowhere, 0, *args)
    assert nowhere.launches == 2


@pytest.mark.parametrize("chunks", [False, True])
def test_paged_attention(nowhere, chunks):
    q_NHD, caches = torch.randn(3, 4, 16), torch.randn(2, 8, 16, 2, 16)
    tables_BM, lens_B = torch.zeros(3, 2, dtype=torch.int32), torch.full((3,), 20, dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 3], dtype=torch.int32) if chunks else None
    cuda = paged_attention._decode_only(partial(_paged_attention_launch.paged_attention_cuda_on, nowhere, 0))
    with NoWaits():
        for run in (paged_attention.BACKEND_TABLE["triton"], cuda):
            run(q_NHD, *caches, tables_BM, lens_B, scale=0.25, cu_seqlens_q=starts)
        for write in (
            paged_attention.WRITE_TABLE["triton"],
            partial(_paged_attention_launch.cache_write_cuda_on, nowhere, 0),
        ):
            write(torch.randn(3, 2, 16), torch.randn(3, 2, 16), *caches, torch.arange(3))
    assert nowhere.launches == 5


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.__setitem__(x > 0, torch.ones(2)),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
    ],
)
def test_the_guard_sees_waits(wait):
    with pytest.raises(HostWait), NoWaits():
        wait(torch.tensor([1.0, -1.0, 2.0, -2.0]))
