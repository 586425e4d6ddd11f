"""One chunk of linear_ppo_loss: a tile of logits [R, V] becomes the loss, its statistics and its gradient, in place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.kernels._backend import extension
from fastppo.kernels._logit_tiles import Launcher, Scales, address
from fastppo.kernels._to_host import ToHost
from fastppo.kernels.logprob import DTYPE_CODES
from fastppo.kernels.ppo_loss import STATS, PPOBatch, PPOLossOptions, PPOStats, ppo_loss


class Loss(NamedTuple):
    """What ppo_loss needs beside log-probs and values."""

    options: PPOLossOptions
    normalizer: float | Tensor
    whiten: tuple | None


class Rows(NamedTuple):
    """The tokens of one chunk, or of all."""

    hidden_RD: Tensor
    values_R: Tensor
    tokens_R: Tensor
    batch: PPOBatch

    def take(self, index) -> "Rows":
        batch = PPOBatch(*(None if x is None else x[index] for x in self.batch))
        return Rows(self.hidden_RD[index], self.values_R[index], self.tokens_R[index], batch)


class Chunk(NamedTuple):
    """A chunk's results; its logits have become dloss/dlogits in rows where dlogprob or dentropy is not zero.

    live_R: those rows. numbers_2: how many they are, and how many must move to stand at the front (see close_ranks).
    """

    loss: Tensor
    stats: PPOStats
    logprob_R: Tensor
    entropy_R: Tensor
    dlogprob_R: Tensor
    dentropy_R: Tensor
    dvalues_R: Tensor
    live_R: Tensor
    numbers_2: ToHost


def live_rows(dlogprob_R: Tensor, dentropy_R: Tensor) -> tuple[Tensor, ToHost]:
    """Chunk's live_R and numbers_2."""
    live_R = (dlogprob_R != 0) | (dentropy_R != 0)
    live = live_R.sum()
    in_front_R = torch.arange(len(live_R), device=live_R.device) < live
    return live_R, ToHost(torch.stack((live, (in_front_R & ~live_R).sum())))


def chunk_by_parts(launcher: Launcher, backend: str | None) -> Callable:
    """A chunk from linear_logprob's two launches on the tile and ppo_loss between them."""

    def chunk(tile_RV, scales: Scales, bias_V, rows: Rows, loss: Loss, want_grad: bool) -> Chunk:
        state_R4 = launcher.new_state(len(tile_RV), tile_RV.device)
        launcher.tile_stats(tile_RV, 0, scales, bias_V, rows.tokens_R, state_R4)
        logprob_R, entropy_R, stats_R2 = launcher.finish(state_R4)
        leaves = [x.detach().requires_grad_() for x in (logprob_R, rows.values_R.float(), entropy_R)]
        with torch.enable_grad():
            value, stats = ppo_loss(
                leaves[0],
                leaves[1],
                rows.batch,
                loss.options,
                entropy_N=leaves[2],
                normalizer=loss.normalizer,
                whiten=loss.whiten,
                backend=backend,
            )
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
        g_R, dvalues_R, h_R = (torch.zeros_like(logprob_R) if x is None else x.contiguous() for x in grads)
        live = live_rows(g_R, h_R)  # on a GPU the numbers travel while the gradient of the tile is made
        if want_grad:
            launcher.tile_grad(tile_RV, 0, scales, bias_V, rows.tokens_R, stats_R2, entropy_R, g_R, h_R)
        return Chunk(value.detach(), stats, logprob_R, entropy_R, g_R, h_R, dvalues_R, *live)

    return chunk


def cpu_chunk(tile_RV, scales: Scales, bias_V, rows: Rows, loss: Loss, want_grad: bool) -> Chunk:
    """The C++ chunk: each row's statistics, loss and gradient while the row is in the cache."""
    count, o = len(tile_RV), loss.options
    mean, rstd = (0.0, 1.0) if loss.whiten is None else (float(x) for x in loss.whiten)
    inputs = [x if x is None else x.contiguous() for x in (rows.tokens_R, rows.values_R.float(), *rows.batch)]
    logprob_R, entropy_R, dlogprob_R, dentropy_R, dvalues_R = torch.empty(5, count).unbind()
    stats_K = torch.empty(len(STATS), dtype=torch.float64)
    value = extension().linear_ppo_loss_chunk(
        (tile_RV.data_ptr(), *tile_RV.shape, tile_RV.stride(0), DTYPE_CODES[tile_RV.dtype]),
        scales,
        address(bias_V),
        [address(x) for x in inputs],
        (
            1 - o.cliprange,
            1 + o.cliprange,
            o.cliprange_value,
            o.vf_coef,
            o.dual_clip or 0.0,
            o.entropy_coef,
            mean,
            rstd,
            1.0 / max(float(loss.normalizer), 1e-30),
        ),
        [x.data_ptr() for x in (logprob_R, entropy_R, dlogprob_R, dentropy_R, dvalues_R, stats_K)],
        want_grad,
    )
    made = (PPOStats((stats_K,)), logprob_R, entropy_R, dlogprob_R, dentropy_R, dvalues_R)
    return Chunk(torch.tensor(value, dtype=torch.float32), *made, *live_rows(dlogprob_R, dentropy_R))
