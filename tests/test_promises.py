"""What the optimise stage promises: no [tokens, vocabulary] tensor, a mismatch that is told, any optimizer that is passed."""

import importlib.util
import logging
import warnings

import golden_cases
import numpy as np
import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastppo
from fastppo import flops
from fastppo.kernels import linear_logprob, linear_ppo_loss

V, ROWS = 1000, 8


class Largest(TorchDispatchMode):
    """Elements of the largest floating point tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.found = max(self.found, x.numel())
        return made


def step_of(name: str, packed: bool) -> tuple[int, int]:
    """(response tokens of the smallest mini-batch, elements of the largest tensor) of a step with V words."""
    models = [
        fastppo.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal(name, vocab_size=V))
        for _ in range(2)
    ]
    config = fastppo.PPOConfig(**golden_cases.BASE, packed=packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fastppo.PPOTrainer(config, *models, golden_cases.tokenizer("right"))
    draw = torch.Generator().manual_seed(0)
    lengths = [50, 51, 52, 53]  # tokens x V are more than all gradients in one buffer
    queries, responses = ([torch.randint(3, V, (n,), generator=draw) for n in part] for part in ([3] * 4, lengths))
    with Largest() as largest:
        made.step(queries, responses, [torch.tensor(float(i)) for i in range(4)])
    assert (made._path._engines.of(made.model) is not None) == (name == "llama") if packed else True
    return sum(lengths[:2]), largest.found


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # the engine; the model's modules and autograd
def test_no_tensor_of_tokens_times_vocabulary(monkeypatch, name):
    """Chunks and tiles are of ROWS rows here; parameters have 32 rows of V."""
    monkeypatch.setattr(flops, "matmul_flops_per_s", lambda *_: 1e9)
    for key in linear_ppo_loss.CHUNK_BYTES:
        monkeypatch.setitem(linear_ppo_loss.CHUNK_BYTES, key, ROWS * V * key[1])
    monkeypatch.setitem(linear_logprob.TILE_BYTES, "cpu", ROWS * V * 4)
    tokens, largest = step_of(name, packed=True)
    assert largest < tokens * V, f"a tensor of {largest} elements; {tokens} tokens x {V} words are {tokens * V}"
    tokens, largest = step_of(name, packed=False)
    assert largest >= tokens * V  # what would be found


@pytest.mark.parametrize("shift", [0.3, 0.001])
def test_the_mismatch_of_rollout_and_training_is_told(caplog, shift):
    """Log-probs of one sequence of the rollout are off by `shift` nats: mean, largest, share of ratios outside [0.9, 1.1]."""
    made = golden_cases.trainer(fastppo, {}, old_logprobs="rollout")
    queries = [torch.tensor([1, 5 + i, 6]) for i in range(4)]
    torch.manual_seed(0)
    responses = made.generate(queries, return_prompt=False, **golden_cases.SAMPLE)
    known = made._rollouts._known
    key = next(iter(known))
    known[key] = (known[key][0] - shift, known[key][1])
    off = len(known[key][0]) / sum(map(len, responses))
    # the first optimizer step measures it
    made.config.mini_batch_size = made.config.backward_batch_size = 4
    with caplog.at_level(logging.WARNING):
        stats = made.step(queries, responses, [torch.tensor(float(i)) for i in range(4)])
    assert stats["fastppo/mismatch_mean"] == pytest.approx(shift * off, abs=1e-5)
    assert stats["fastppo/mismatch_max"] == pytest.approx(shift, abs=1e-5)
    assert stats["fastppo/mismatch_outside"] == pytest.approx(off if shift > 0.1 else 0.0, abs=1e-6)
    assert ("rollout and training log-probs differ by" in caplog.text) == (shift * off > made.config.max_mismatch)
    assert (shift * off > made.config.max_mismatch) == (shift == 0.3)


class Adam8bit(torch.optim.Optimizer):
    """Adam whose two moments are 8-bit integers with one scale per tensor."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"t": 0, "m": torch.zeros_like(p, dtype=torch.int8), "m_scale": torch.tensor(1.0)}
                    state |= {"r": torch.zeros_like(p, dtype=torch.uint8), "r_scale": torch.tensor(1.0)}
                state["t"] += 1
                m = 0.9 * state["m"] * state["m_scale"] + 0.1 * p.grad
                root = (0.999 * (state["r"] * state["r_scale"]) ** 2 + 0.001 * p.grad**2).sqrt()
                unbiased = root / (1 - 0.999 ** state["t"]) ** 0.5
                p -= group["lr"] * m / (1 - 0.9 ** state["t"]) / (unbiased + 1e-3 * unbiased.max() + 1e-12)
                for name, x, most in (("m", m, 127), ("r", root, 255)):
                    state[f"{name}_scale"] = x.abs().max() / most + 1e-20
                    state[name] = (x / state[f"{name}_scale"]).round().to(state[name].dtype)


def bitsandbytes_adam(params, lr: float):
    import bitsandbytes

    return bitsandbytes.optim.Adam8bit(params, lr=lr, min_8bit_size=1)


@pytest.mark.parametrize("kind", ["own", "bitsandbytes"])
def test_an_8_bit_optimizer_learns_as_adam_does(kind):
    if kind == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    after, start = {}, None
    for eight in (False, True):
        model, reference = (golden_cases.value_model(fastppo, {}, perturb) for perturb in (True, False))
        make = torch.optim.Adam if not eight else Adam8bit if kind == "own" else bitsandbytes_adam
        config = fastppo.PPOConfig(**golden_cases.BASE, max_grad_norm=0.5)
        options = {"optimizer": make(list(model.parameters()), lr=1e-3)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = fastppo.PPOTrainer(config, model, reference, golden_cases.tokenizer("right"), **options)
        start = start or golden_cases.weights(made)
        np.random.seed(0)
        for data in golden_cases.batches({}, 2):
            stats = made.step(*data)
        assert np.isfinite(stats["ppo/loss/total"]) and stats["ppo/learning_rate"] == 1e-3
        after[eight] = torch.cat([(a - b).flatten() for a, b in zip(golden_cases.weights(made), start, strict=True)])
        if eight:
            states = made.optimizer.state_dict()["state"].values()
            assert states and all(
                any(getattr(x, "dtype", None) in (torch.int8, torch.uint8) for x in s.values()) for s in states
            )
    assert torch.cosine_similarity(after[True], after[False], dim=0) > 0.7
