"""Packed attention: logits and gradients equal to the model's own padded forward; back ends are chosen with reasons."""

import sys
import types

import pytest
import torch
from architectures import ARCHITECTURES, tiny

from fastppo import attention
from fastppo.attention import backends
from fastppo.attention.layout import Packed
from fastppo.attention.varlen import varlen_attention

LENGTHS = [7, 1, 20, 7, 13]  # equal pair; single token; longer than the windows of 6


def _pack(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return cu, max(lengths)


def _sequences(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def _own_logits(model, sequences):
    """Logits of the real tokens from the model's own right-padded forward."""
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=3)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in sequences], batch_first=True)
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


def _packed_logits(model, sequences):
    with attention.install(model), attention.packed(*_pack([len(x) for x in sequences])) as layout:
        tokens = torch.cat(sequences)[None]
        return model(input_ids=tokens, position_ids=layout.position_ids, use_cache=False).logits[0]


def _backward(model, logits):
    model.zero_grad()
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_forward_and_backward_equal_the_models_own(name):
    model, sequences = tiny(name), _sequences()
    before = model.config._attn_implementation
    wanted = _own_logits(model, sequences)
    wanted_grads = _backward(model, wanted)
    got = _packed_logits(model, sequences)
    got_grads = _backward(model, got)
    assert model.config._attn_implementation == before
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert got_grads.keys() == wanted_grads.keys()
    for key, grad in wanted_grads.items():
        error = (got_grads[key] - grad).abs().max()
        assert error <= 1e-4 * grad.abs().max() + 1e-6, f"{key}: {error} of {grad.abs().max()}"


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [60, 3, 61, 2, 120, 1]])  # one; a plain view; several buckets
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_varlen_attention_equals_one_call_per_sequence(lengths, window, softcap):
    generator = torch.Generator().manual_seed(0)
    layout = Packed(*_pack(lengths))
    q = torch.randn(sum(lengths), 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(sum(lengths), 2, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    out = varlen_attention(q, k, v, layout, scale=0.3, window=window, softcap=softcap)
    parts = []
    for q_i, k_i, v_i in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_i, k_i.repeat_interleave(2, 1)) * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        age = torch.arange(len(q_i))[:, None] - torch.arange(len(q_i))[None]
        hidden = (age < 0) | (age >= (window or 10**6))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v_i.repeat_interleave(2, 1)))
    wanted = torch.cat(parts)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    direction = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    for got, want in zip(
        torch.autograd.grad((out * direction).sum(), (q, k, v)),
        torch.autograd.grad((wanted * direction).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_buckets_keep_padding_low():
    lengths = [8 + 8 * (i % 8) for i in range(64)]
    layout = Packed(*_pack(lengths))
    padded = sum(bucket.b * bucket.t for bucket in layout.buckets)
    assert len(layout.buckets) <= 4 and sum(lengths) <= padded <= 1.5 * sum(lengths)
    tokens = torch.cat([bucket.tokens for bucket in layout.buckets])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))


def test_worked_by_hand():
    # two sequences, [a] and [b, c]; values are 1, 2, 4; all scores equal -> plain means over what may be seen
    layout = Packed(torch.tensor([0, 1, 3], dtype=torch.int32), 2)
    zero, value = torch.zeros(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert varlen_attention(zero, zero, value, layout, scale=1.0).flatten().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_sees_the_layout_of_its_own_forward(use_reentrant):
    model, sequences = tiny("llama"), _sequences()
    wanted = _backward(model, _packed_logits(model, sequences))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    function = model.model.layers[0]._gradient_checkpointing_func
    logits = _packed_logits(model, sequences)
    with attention.install(model), attention.packed(*_pack([3, 45])):  # a later forward has another layout
        got = _backward(model, logits)
    assert model.model.layers[0]._gradient_checkpointing_func is function
    for key, grad in wanted.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-5)


def test_install_nests_and_restores_after_an_error():
    model = tiny("gpt2")
    with pytest.raises(KeyboardInterrupt), attention.install(model):
        with attention.install(model):
            assert model.config._attn_implementation == "fastppo"
        assert model.config._attn_implementation == "fastppo"
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
    assert attention.current() is None


def test_bad_inputs_say_what_to_do():
    model = tiny("llama")
    with attention.install(model), attention.packed(*_pack([2, 3])), pytest.raises(ValueError, match=r"is \[1, 5\]"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(RuntimeError, match="without a layout"), attention.install(model):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token"), attention.packed(*_pack([2, 0])):
        pass
    with pytest.raises(ValueError, match="int32"), attention.packed(torch.tensor([0, 2]), 2):
        pass


def test_models_outside_the_interface_are_named():
    import transformers as t

    for config, reason in (
        (t.GPTJConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=2, rotary_dim=4), "attention interface"),
        (t.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2), "attention interface"),
        (t.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1), "attention interface"),
    ):
        model = t.AutoModelForCausalLM.from_config(config)
        assert reason in attention.unsupported(model)
        with pytest.raises(attention.Unsupported, match=reason):
            attention.install(model)


# -- back ends ---------------------------------------------------------------------------------------------------------

GPU_CALL = backends.Call("cuda", torch.bfloat16, 64, 64, None, 0.0)


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("FASTPPO_ATTN", raising=False)
    backends.load.cache_clear()
    yield monkeypatch
    backends.load.cache_clear()


def _fake(monkeypatch, name, **symbols):
    module = types.ModuleType(name)
    for key, x in symbols.items():
        setattr(module, key, x)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_missing_package_gives_the_reason(fresh):
    fresh.setitem(sys.modules, "flash_attn", None)
    fresh.setitem(sys.modules, "flash_attn_interface", None)
    assert "does not import" in backends.missing("fa2", GPU_CALL)
    assert "does not import" in backends.missing("fa3", GPU_CALL)
    assert backends.choose(GPU_CALL) == "varlen"


def test_an_empty_namespace_is_not_flash_attention(fresh):
    _fake(fresh, "flash_attn")
    assert "has no flash_attn_varlen_func" in backends.missing("fa2", GPU_CALL)


@pytest.mark.parametrize("error", [OSError("libcudart.so.12: cannot open"), ImportError("undefined symbol: _ZN3c10")])
def test_a_broken_binary_gives_the_reason(fresh, error):
    def broken(name):
        raise error

    fresh.setattr(backends.importlib, "import_module", broken)
    assert str(error) in backends.missing("fa2", GPU_CALL)


def test_order_and_limits(fresh):
    _fake(fresh, "flash_attn_interface", flash_attn_varlen_func=lambda: None)
    _fake(fresh, "flash_attn", flash_attn_varlen_func=lambda: None)
    assert backends.choose(GPU_CALL) == "fa3"
    assert backends.choose(GPU_CALL._replace(dropout=0.1)) == "fa2"
    assert backends.choose(GPU_CALL._replace(dtype=torch.float32)) == "sdpa"
    assert backends.choose(GPU_CALL._replace(head_dim=20)) == "sdpa"
    fresh.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert backends.choose(GPU_CALL) == "fa2"
    fresh.setitem(sys.modules, "flash_attn", None)
    backends.load.cache_clear()
    assert backends.choose(GPU_CALL) == "varlen"
    assert backends.choose(GPU_CALL._replace(softcap=30.0)) == "sdpa"


def test_a_forced_back_end_runs_or_raises(fresh):
    model, sequences = tiny("gpt2"), _sequences()
    fresh.setenv("FASTPPO_ATTN", "varlen")
    with pytest.raises(RuntimeError, match="FASTPPO_ATTN=varlen was asked for but it needs a CUDA tensor"):
        _packed_logits(model, sequences)
    fresh.setenv("FASTPPO_ATTN", "fa9")
    with pytest.raises(RuntimeError, match="there are fa3, fa2, varlen, sdpa"):
        _packed_logits(model, sequences)
    fresh.setenv("FASTPPO_ATTN", "sdpa")
    _packed_logits(model, sequences)
