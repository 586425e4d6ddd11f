"""Optimise: groups of mini-batches, the padded loss against plain PyTorch, clipping, guards, eval mode."""

import golden_cases
import numpy as np
import pytest
import torch
from torch import nn

from fastppo import PPOConfig, update
from fastppo.score import NonFinite

B, T, V = 4, 7, 13


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    mask = torch.rand(B, T, generator=g) > 0.3
    logits = randn(B, T, V).requires_grad_()
    tokens = torch.randint(V, (B, T), generator=g)
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old = logprobs.detach() + 0.3 * randn(B, T)
    return old, randn(B, T), logits, randn(B, T).requires_grad_(), logprobs, mask, randn(B, T), randn(B, T)


def plain_losses(config, old, values, logits, vpreds, logprobs, mask, advantages, returns):
    """PPO's two losses as in the paper, float64."""
    mean = lambda x: x[mask].mean()  # noqa: E731
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
    policy = mean(torch.maximum(-advantages * ratio, -advantages * clipped))
    near = vpreds.clamp(values - config.cliprange_value, values + config.cliprange_value)
    value = 0.5 * mean(torch.maximum((vpreds - returns) ** 2, (near - returns) ** 2))
    return policy, config.vf_coef * value


def test_padded_loss_and_its_gradients():
    config = PPOConfig(vf_coef=0.7)
    args = tensors()
    policy, value, stats = update.padded_loss(config, *args)
    want_policy, want_value = plain_losses(config, *args)
    torch.testing.assert_close(policy, want_policy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, want_value, rtol=1e-5, atol=1e-6)
    leaves = (args[2], args[3])
    got = torch.autograd.grad(policy + value, leaves, retain_graph=True)
    want = torch.autograd.grad(want_policy + want_value, leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    entropy = -(args[2].log_softmax(-1) * args[2].softmax(-1)).sum(-1)[args[5]].mean()
    torch.testing.assert_close(stats["policy/entropy"], entropy.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats["loss/total"], (policy + value).detach(), rtol=1e-5, atol=1e-6)


def test_losses_can_be_differentiated_apart():
    args = tensors()
    policy, value, _ = update.padded_loss(PPOConfig(), *args)
    assert torch.autograd.grad(policy, args[3], allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(value, args[2], allow_unused=True)[0] is None


def test_above_the_ratio_threshold_nothing_is_learnt():
    args = tensors()
    with pytest.warns(UserWarning, match="exceeds threshold 0.01"):
        policy, value, stats = update.padded_loss(PPOConfig(ratio_threshold=0.01), *args)
    grads = torch.autograd.grad(policy + value, (args[2], args[3]))
    assert all(not grad.any() for grad in grads)
    assert stats["loss/policy"] == stats["loss/value"] == 0 and stats["policy/approxkl"] > 0


def test_groups_hold_every_row_once_in_numpys_order():
    config = PPOConfig(batch_size=12, mini_batch_size=2, gradient_accumulation_steps=3)
    np.random.seed(5)
    made = list(update.groups(config))
    np.random.seed(5)
    assert sum(sum(made, []), []) == np.random.permutation(12).tolist()
    assert [[len(rows) for rows in group] for group in made] == [[2, 2, 2]] * 2


def test_optimise_stops_early():
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=4)
    kls = iter([0.1, 0.2, 0.3, 9.0, 0.0, 0.0, 0.0, 0.0])
    learn = lambda group: [{"policy/policykl": next(kls)}]  # noqa: E731
    stats = update.optimise(config, learn, lambda kl: kl > 1)
    assert [x["policy/policykl"] for x in stats] == [0.1, 0.2, 0.3, 9.0]


def test_clip_scales_to_the_norm():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 1.5])
    assert update.clip(parameters, None) == 2.5
    assert update.clip(parameters, 1.0) == 2.5
    assert update.clip(parameters, None) == pytest.approx(1.0, rel=1e-5)


def test_guard_stops_or_skips_and_names_the_batch():
    stop, skip = update.Guard("stop"), update.Guard("skip")
    assert stop.allows("loss", 1.0)
    with pytest.raises(NonFinite, match=r"loss is nan in mini-batch rows \[3, 1\] of step 7"):
        stop.allows("loss", float("nan"), [3, 1], 7)
    with pytest.warns(RuntimeWarning, match="gradient norm is inf"):
        assert not skip.allows("gradient norm", float("inf"), [0], 1)
    assert skip.skipped == 1


def test_eval_mode_turns_dropout_off_but_leaves_checkpointing_on_and_restores():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gradient_checkpointing = True
            self.dropout = nn.Dropout(0.5)

    model = nn.Sequential(Layer(), nn.Dropout(0.5)).train()
    model[1].eval()
    with update.eval_mode(model, None):
        assert model[0].training and not model[0].dropout.training and not model.training
    assert model.training and model[0].dropout.training and not model[1].training


def test_flops_worked_by_hand():
    """Llama of tiny_models: 2 layers of q 32x32, k and v 16x32, o 32x32, three 48x32; head 96x32; width 32.

    Past the last layer's attention only what predicts a response token goes on.
    """
    import fastppo
    from fastppo import flops

    made = golden_cases.trainer(fastppo, {"model": "llama"})
    cost = flops.policy_cost(made.model)
    qkv, past_attention = 32 * 32 + 2 * 16 * 32, 32 * 32 + 3 * 48 * 32
    assert cost == flops.Cost(2.0 * (2 * qkv + past_attention), 4.0 * 2 * 32, 2.0 * (96 * 32 + past_attention), 3.0)
    assert cost.forward([3], [2]) == 3 * cost.token + 6 * cost.token_position + 2 * cost.response
    adapted = golden_cases.trainer(fastppo, {"lora": True})
    assert flops.policy_cost(adapted.model).trained == 2.0
    stats = made.step(*next(golden_cases.batches({}, 1)))
    assert 0 < stats["fastppo/optimise_mfu"] < 1.5 and 0 < stats["fastppo/prepare_mfu"] < 1.5
    assert stats["fastppo/matmul_flops_per_s"] > 1e6
