"""Which kernel attends in a decode step (fastppo/attention/decode.py), with flash-attention's packages faked: none is installed here and none
of them has run. What each is called with is held to the signatures that their sources document."""

import types

import pytest
import torch

from fastppo.attention import decode
from fastppo.attention.decode import DecodeCall

GPU = DecodeCall("cuda", torch.bfloat16, torch.bfloat16, 128, 16, None)


@pytest.fixture
def packages(monkeypatch):
    """name of a module -> its functions; every other flash-attention package is missing. On a Hopper GPU."""
    found: dict[str, types.SimpleNamespace] = {}
    monkeypatch.setattr(
        "fastppo.attention.backends.importlib.import_module",
        lambda name: found[name] if name in found else (_ for _ in ()).throw(ImportError(f"No module named {name!r}")),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("FASTPPO_DECODE_ATTN", raising=False)
    decode.load.cache_clear()
    yield found
    decode.load.cache_clear()


def fa(table: str):
    """flash_attn_with_kvcache, returning what it was given."""

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, window_size, softcap, num_splits, **rest):  # fmt: skip
        assert set(rest) == {table} and causal and num_splits == 1 and q.shape[1] == 1
        flash_attn_with_kvcache.given = (cache_seqlens, rest[table], softmax_scale, window_size, softcap)
        return q * 2

    import inspect

    names = ("q", "k_cache", "v_cache", "cache_seqlens", table, "softmax_scale", "causal", "window_size", "softcap", "num_splits")  # fmt: skip
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    flash_attn_with_kvcache.__signature__ = inspect.Signature(parameters)
    return types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)


def varlen(*leave_out: str):
    names = {"block_table", "seqused_k", "num_splits"} - set(leave_out)
    namespace = {}
    keywords = ", ".join(f"{name}=None" for name in sorted(names))
    exec(f"def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa, {keywords}): return q", namespace)  # fmt: skip
    return types.SimpleNamespace(varlen_attn=namespace["varlen_attn"])


def test_ours_unless_asked(packages, monkeypatch):
    packages["flash_attn_interface"] = fa("page_table")
    assert decode.choose(GPU) == "paged"
    monkeypatch.setenv("FASTPPO_DECODE_ATTN", "auto")
    assert decode.choose(GPU) == "fa3"


def test_auto_takes_the_first_that_can(packages, monkeypatch):
    monkeypatch.setenv("FASTPPO_DECODE_ATTN", "auto")
    assert decode.choose(GPU) == "paged"
    packages |= {"flash_attn": fa("block_table"), "torch.nn.attention.varlen": varlen()}
    decode.load.cache_clear()
    large = GPU._replace(block_size=256)
    assert decode.choose(GPU) == "paged", "pages of 16"
    assert decode.choose(large) == "varlen"
    assert decode.choose(large._replace(softcap=30.0)) == "fa2"
    assert decode.choose(large._replace(dtype=torch.float32)) == "paged"
    assert decode.choose(large._replace(head_dim=20)) == "paged"
    assert decode.choose(large._replace(device_type="cpu")) == "paged"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert decode.choose(large) == "paged"


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        ("fa3", GPU, "flash_attn_interface does not import: ImportError"),
        ("fa2", GPU, r"pages of a multiple of 256 tokens, got 16 \(Generator\(block_size=256\)\)"),
        ("varlen", GPU, "varlen_attn of this version does not take block_table, num_splits"),
        ("fa2", GPU._replace(cache_dtype=torch.float16), "both float16 or both bfloat16"),
        ("fa4", GPU, "no such decoder; there are fa3, varlen, fa2, paged and auto"),
    ],
)
def test_what_is_asked_for_runs_or_raises(packages, monkeypatch, name, call, words):
    packages |= {"flash_attn": fa("block_table"), "torch.nn.attention.varlen": varlen("block_table", "num_splits")}
    monkeypatch.setenv("FASTPPO_DECODE_ATTN", name)
    with pytest.raises(RuntimeError, match=f"FASTPPO_DECODE_ATTN={name} was asked for but .*{words}"):
        decode.choose(call)


def test_an_empty_flash_attn_namespace_is_no_flash_attn(packages):
    """flash-attn 4 installs one."""
    packages["flash_attn"] = types.SimpleNamespace()
    assert "imports but has no flash_attn_with_kvcache" in decode.missing("fa2", GPU)


@pytest.mark.parametrize(("name", "module", "table"), [("fa3", "flash_attn_interface", "page_table"), ("fa2", "flash_attn", "block_table")])  # fmt: skip
def test_what_flash_attention_is_given(packages, name, module, table):
    packages[module] = fa(table)
    q_BHD, cache = torch.randn(2, 4, 16), torch.zeros(3, 256, 2, 16)
    tables_BM, lens_B = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32)
    run = decode.DECODERS[name][4]
    out = run(q_BHD, cache, cache, tables_BM, lens_B, scale=0.25, window=100, softcap=None)
    assert torch.equal(out, q_BHD * 2)
    lens, pages, *rest = packages[module].flash_attn_with_kvcache.given
    assert lens is lens_B and pages is tables_BM and rest == [0.25, (99, 0), 0.0]


def test_decode_attention_is_paged_attention_on_a_cpu(monkeypatch):
    monkeypatch.delenv("FASTPPO_DECODE_ATTN", raising=False)
    q_BHD, cache = torch.randn(1, 2, 8), torch.randn(2, 4, 1, 8)
    tables_BM, lens_B = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    out = decode.decode_attention(q_BHD, cache, cache, tables_BM, lens_B, scale=0.5, window=None, softcap=None)
    keys = cache[[1, 0]].flatten(0, 1)[:6, 0]
    torch.testing.assert_close(out[0], (q_BHD[0] @ keys.T * 0.5).softmax(-1) @ keys)
