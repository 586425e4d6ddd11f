"""The engine against the model's own modules in float64: losses, log-probs and every gradient; and when it steps aside."""

import numpy as np
import pytest
import torch
import transformers
from golden_cases import batches, trainer, weights

import fastppo
from fastppo import attention, packed
from fastppo.engine import body, engine_for, kernels
from fastppo.kernels._backend import extension
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions
from fastppo.models.head import output_head

SMALL = dict(vocab_size=101, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=80),
    # odd head size (8), every head its own keys
    "llama": lambda: transformers.LlamaConfig(**SMALL | dict(hidden_size=40, num_attention_heads=5)),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    # a window in the second block alone
    "qwen2 window": lambda: transformers.Qwen2Config(
        **SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=24),
    "qwen3 one key": lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=16),
    # a window shorter than the sequences
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=9),
}


def made(name: str):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return fastppo.AutoModelForCausalLMWithValueHead.from_pretrained(model).eval()


def engine_of(model):
    return engine_for(model, output_head(model), model.v_head)


def some_pack(seed: int = 0):
    """Sequences of 8, 10, 73 and 18 tokens: shorter and longer than a block of 32 queries."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, 101, (n,), generator=g)  # noqa: E731
    queries, responses = [draw(n) for n in (5, 1, 40, 17)], [draw(n) for n in (3, 9, 33, 1)]
    pack = packed.pack(packed.sequences(queries, responses, None, False), range(4), only_counting=True)
    R = len(pack.at_R)
    old = -4.5 + 0.3 * torch.randn(R, generator=g)
    return pack, PPOBatch(old, *(torch.randn(R, generator=g) for _ in range(3)))


CLIPPED = PPOLossOptions()
# a token at the edge of a clip range would be in or out by a rounding of bfloat16
UNCLIPPED = PPOLossOptions(cliprange=50.0, cliprange_value=50.0)


def own_modules(model, pack, batch, backend=None, options=CLIPPED):
    """(loss, logprobs, gradients) by the model's modules and autograd."""
    model.zero_grad()
    with attention.install(model):
        hidden = packed.hidden_states(model, pack)
        values = model.v_head(hidden)[:, 0]
        out = linear_ppo_loss(
            hidden, values, output_head(model), pack.targets_R, batch, options, normalizer=46.0, backend=backend
        )
        out.loss.backward()
    return out.loss.detach(), out.logprob_N, {n: p.grad.double() for n, p in model.named_parameters()}


def by_engine(model, pack, batch, dtype=torch.float32, times=1, options=CLIPPED):
    engine = engine_of(model)
    assert not isinstance(engine, str), engine
    model.zero_grad()
    with engine.started(dtype):
        for _ in range(times):
            out = engine.learn(pack, batch, options, 46.0, True)
    return out.loss, out.logprob_R, {n: p.grad.double() for n, p in model.named_parameters()}


@pytest.fixture(params=["blocks in one call", "call by call"])
def way(request, monkeypatch):
    """Processors without AMX tiles, and models with norms of heads, go call by call in either."""
    if request.param == "call by call":
        monkeypatch.setattr(body, "fits", lambda spec: False)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_as_exact_as_the_modules(name, way):
    model, (pack, batch) = made(name), some_pack()
    loss, logprob, grads = by_engine(model, pack, batch)
    _, plain_logprob, plain = own_modules(model, pack, batch)
    true_loss, true_logprob, truth = own_modules(model.double(), pack, batch, "reference")
    assert abs(float(loss - true_loss)) < 1e-6
    allowed = 2 * float((plain_logprob - true_logprob).abs().max()) + 1e-6
    assert float((logprob - true_logprob).abs().max()) <= allowed
    for key, want in truth.items():
        error, plain_error = relative(grads[key], want), relative(plain[key], want)
        assert error <= 2 * plain_error + 1e-6, f"{key}: {error:.2e}, the modules {plain_error:.2e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_exact_as_autocast(name, way):
    model, (pack, batch) = made(name), some_pack()
    _, logprob, grads = by_engine(model, pack, batch, torch.bfloat16, options=UNCLIPPED)
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        with attention.install(model):
            hidden = packed.hidden_states(model, pack)
            values = model.v_head(hidden)[:, 0].float()
            head = packed.head_for(model, hidden)
            out = linear_ppo_loss(hidden, values, head, pack.targets_R, batch, UNCLIPPED, normalizer=46.0)
    out.loss.backward()
    plain = {n: p.grad.double() for n, p in model.named_parameters()}
    _, true_logprob, truth = own_modules(model.double(), pack, batch, "reference", UNCLIPPED)
    error, plain_error = (float((x - true_logprob).abs().mean()) for x in (logprob, out.logprob_N))
    assert error <= 2 * plain_error + 1e-3, f"{error:.2e}, autocast {plain_error:.2e}"
    for key, want in truth.items():
        error, plain_error = relative(grads[key], want), relative(plain[key], want)
        assert error <= 2 * plain_error + 1e-2, f"{key}: {error:.2e}, autocast {plain_error:.2e}"


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gpt2"])
def test_gradients_of_two_microbatches_add_up(name):
    model, (pack, batch) = made(name), some_pack()
    once, twice = (by_engine(model, pack, batch, times=n)[2] for n in (1, 2))
    for key, want in once.items():
        torch.testing.assert_close(twice[key], 2 * want, rtol=1e-5, atol=1e-8)


def test_gradients_that_lie_otherwise_are_added_to(way):
    """Somebody else's .grad in columns: the kernels write rows."""
    model, (pack, batch) = made("qwen2"), some_pack()
    once = by_engine(model, pack, batch)[2]
    for p in model.parameters():
        p.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad
    engine = engine_of(model)
    with engine.started(torch.float32):
        engine.learn(pack, batch, CLIPPED, 46.0, True)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), 2 * once[name], rtol=1e-5, atol=1e-8)


def test_frozen_parameters_get_no_gradient_and_change_no_other(way):
    model, (pack, batch) = made("gpt2"), some_pack()
    _, _, whole = by_engine(model, pack, batch)
    frozen = [n for n, _ in model.named_parameters() if ".h.0." in n or ".wte." in n]
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
        p.grad = None
    engine = engine_of(model)
    with engine.started(torch.float32):
        engine.learn(pack, batch, CLIPPED, 46.0, True)
    for name, p in model.named_parameters():
        if name in frozen:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad.double(), whole[name], rtol=1e-5, atol=1e-8)


def test_a_frozen_half_of_a_norm_leaves_the_other_to_add_up(way):
    """Micro-batches with only biases to train (BitFit): a norm's weight has no gradient that says whether to add."""
    model, (pack, batch) = made("gpt2"), some_pack()
    for name, p in model.named_parameters():
        p.requires_grad_("bias" in name)
    engine, grads = engine_of(model), []
    for times in (1, 2):
        model.zero_grad()
        with engine.started(torch.float32):
            for _ in range(times):
                engine.learn(pack, batch, CLIPPED, 46.0, True)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, once in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], 2 * once, rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [False, True])  # some optimizers write p.data = ...
def test_weights_are_read_again_after_an_optimizer_step(dtype, moved):
    for name in ("llama", "gpt2"):
        model, (pack, batch) = made(name), some_pack()
        engine = engine_of(model)
        with engine.started(dtype):
            engine.learn(pack, batch, CLIPPED, 46.0, True)
            before = [p.data for p in model.parameters()]  # kept, or the new memory could be where the old was
            for p, old in zip(model.parameters(), before, strict=True):
                if moved:
                    p.data = old * 1.1
                else:
                    old.mul_(1.1)
            engine.refresh()
            after = engine.learn(pack, batch, CLIPPED, 46.0, False).logprob_R
        with engine.started(dtype):
            fresh = engine.learn(pack, batch, CLIPPED, 46.0, False).logprob_R
        assert torch.equal(after, fresh)


@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 37, 5), (70, 172, 64)])  # least; nothing divides; a small model's
@pytest.mark.parametrize("k_first", [(False, False), (True, True)])
def test_small_products(shape, k_first):
    """C += A B + bias, both factors in either orientation; a row is the same whatever the other rows are."""
    M, N, K = shape
    g = torch.Generator().manual_seed(0)
    a, b, bias = torch.randn(M, K, generator=g), torch.randn(K, N, generator=g), torch.randn(N, generator=g)
    laid_a, laid_b = (a, b.t().contiguous()) if k_first[0] else (a.t().contiguous(), b)
    made, before = torch.randn(M, N, generator=g), None
    wanted = made.double() + a.double() @ b.double() + bias.double()
    plain = torch.addmm(made + bias, a, b)
    for rows in (M, 1):
        out = made.clone()
        addresses = (laid_a.data_ptr(), laid_b.data_ptr(), out.data_ptr(), bias.data_ptr())
        sizes = (rows, N, K, laid_a.stride(0), laid_b.stride(0), N)
        extension().small_product(addresses, sizes, k_first[0] | k_first[1] << 1 | 32)
        assert before is None or torch.equal(out[:1], before[:1])
        before = out if before is None else before
    error, plain_error = (float((x - wanted).abs().max()) for x in (before, plain))
    assert error <= 2 * plain_error + 1e-6, f"{error:.2e}, torch {plain_error:.2e}"


def test_attention_worked_out_by_hand():
    """One head of one number, two tokens: the second sees both, weighted by e^0 and e^1."""
    heads = kernels.Heads(H=1, K=1, D=1, scale=1.0, window=None)
    where = kernels.Where(torch.tensor([0, 2], dtype=torch.int32), None, None)
    qkv = torch.tensor([[7.0, 0.0, 10.0], [1.0, 1.0, 20.0]])
    out, lse = kernels.attention(qkv, where, heads)
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(out, torch.stack([torch.tensor(10.0), (10 + 20 * e) / (1 + e)])[:, None])
    torch.testing.assert_close(lse, torch.stack([torch.tensor(0.0), (1 + e).log()])[:, None])


def test_kernels_do_not_depend_on_the_number_of_threads():
    pack, _ = some_pack()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        heads, g = kernels.Heads(4, 2, 16, 0.25, 30), torch.Generator().manual_seed(0)
        qkv = torch.randn(int(pack.cu_seqlens[-1]), heads.width, generator=g)
        where = kernels.Where(pack.cu_seqlens, None, None)
        out, lse = kernels.attention(qkv, where, heads)
        results.append((out, lse, kernels.attention_backward(out, qkv, out, lse, where, heads)))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_steps_aside_for_what_it_does_not_know():
    model = made("gpt2")
    handle = model.pretrained_model.transformer.h[0].register_forward_hook(lambda *_: None)
    assert "hooks" in engine_of(model)
    handle.remove()
    engine = engine_of(model)
    assert engine.still_fits()
    model.pretrained_model.transformer.h[0].mlp.act = torch.nn.ReLU()
    assert not engine.still_fits()
    assert "ReLU" in engine_of(model)
    gemma = transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16)
    )
    assert "not one of the models" in engine_for(gemma, output_head(gemma), None)
    half = made("llama")
    half.pretrained_model.bfloat16()
    assert "bfloat16" in engine_of(half)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_a_packed_step_equals_a_padded_one(name):
    """Two steps: the second starts from weights that the engine's gradients have changed."""
    stats = []
    for way in (True, False):
        made = trainer(fastppo, {"model": name}, packed=way)
        np.random.seed(0)
        stats.append([made.step(*data[:3]) for data in batches({}, 2)])
        if way:
            assert (made._path._engines.of(made.model) is not None) == (name != "gemma2")
    for ours, padded in zip(*stats, strict=True):
        for key in ("ppo/loss/total", "ppo/policy/approxkl", "ppo/val/error", "ppo/returns/mean", "objective/kl"):
            assert ours[key] == pytest.approx(padded[key], rel=1e-4, abs=1e-4), key


def test_hooks_on_gradients_still_run():
    model, seen = made("llama"), []
    model.pretrained_model.model.norm.weight.register_hook(seen.append)
    assert "hooks" in engine_of(model)


@pytest.mark.parametrize("error", [MemoryError("std::bad_alloc"), RuntimeError("alloc_cpu.cpp: can't allocate memory")])
def test_out_of_memory_halves_the_budget_and_gives_the_same_weights(error, monkeypatch, caplog):
    """The kernel fails once, at the end of a backward pass: gradients are there that must not count."""
    after, backward = [], kernels.embedding_backward
    for fails in (0, 1):
        made = trainer(fastppo, {"model": "gpt2", "sgd": True})  # Adam would make much of a rounding
        left = [error] * fails

        def failing(*args, left=left):
            backward(*args)
            if left:
                raise left.pop()

        monkeypatch.setattr(kernels, "embedding_backward", failing)
        np.random.seed(0)
        with caplog.at_level("WARNING"):
            for data in batches({}, 2):
                made.step(*data)
        assert not left
        after.append(weights(made))
    assert caplog.text.count("out of memory: max_tokens_per_micro_batch is") == 1
    for got, want in zip(*reversed(after), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_other_errors_of_a_kernel_are_not_taken_for_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(kernels, "embedding_backward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer(fastppo, {"model": "gpt2"}).step(*next(batches({}, 1)))
