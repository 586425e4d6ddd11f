"""mm against float64: at most twice the error of torch's own product, in every orientation, dtype and way of adding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cases import assert_as_exact_as_torch

from fastppo.kernels import _products
from fastppo.kernels._products import by_torch, mm, on_tiles

HALF, FULL = torch.bfloat16, torch.float32
WAYS = {"torch": by_torch, "tiles": on_tiles}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "tiles" and _products._amx() is None:
        pytest.skip("this processor has no AMX tiles, or FASTPPO_AMX=0")
    run = WAYS[request.param]

    def into(a, b, out, bias=None, add=False):
        assert run(a, b, out, bias, add) is not False, "the tiles were refused"
        return out

    # torch rounds the product before it adds: up to three roundings to the result's dtype, where the tiles have one
    into.roundings = 3 if request.param == "torch" else 1
    return into


def laid_out(x, how: str):
    """The same numbers as rows, as columns, or as a slice of columns of a wider matrix."""
    if how == "columns":
        return x.t().contiguous().t()
    if how == "slice":
        return torch.cat((x, x, x), 1)[:, x.shape[1] : 2 * x.shape[1]]
    return x.contiguous()


def check(way, M, N, K, *, dtype=FULL, out_dtype=None, a_how="rows", b_how="rows", bias=None, add=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    a, b, before = laid_out(draw(M, K).to(dtype), a_how), laid_out(draw(K, N).to(dtype), b_how), draw(M, N)
    out_dtype = out_dtype or dtype
    bias_N = None if bias is None else draw(N).to(bias)
    ours = laid_out(before.to(out_dtype), "slice")
    truth = a.double() @ b.double()
    plain = (a @ b).double()
    for x in ([] if bias is None else [bias_N]) + ([before.to(out_dtype)] if add else []):
        truth, plain = truth + x.double(), (plain + x.double())
    way(a, b, ours, bias_N, add)
    assert_as_exact_as_torch(
        "product", ours, plain.to(out_dtype), truth, way.roundings * (1e-6 if out_dtype == FULL else 4e-3)
    )


# one number; odd; edges of tiles of 16 and 32; past 256 values of k; past a block of 768 or 2048 of them; past a block of rows
SHAPES = [(1, 1, 1), (3, 5, 7), (16, 32, 32), (33, 70, 517), (40, 257, 100), (7, 40, 2500), (1000, 33, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("hows", [("rows", "columns"), ("rows", "rows"), ("columns", "rows"), ("columns", "slice")])
def test_matches_float64(way, shape, dtype, hows):
    check(way, *shape, dtype=dtype, a_how=hows[0], b_how=hows[1])


@pytest.mark.parametrize("dtype, out_dtype", [(FULL, FULL), (HALF, HALF), (HALF, FULL)])
@pytest.mark.parametrize("bias", [None, FULL, HALF])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("K", [100, 2500])
def test_bias_and_add(way, dtype, out_dtype, bias, add, K):
    check(way, 35, 45, K, dtype=dtype, out_dtype=out_dtype, bias=bias, add=add)


@settings(deadline=None, max_examples=60)
@given(
    M=st.integers(1, 70),
    N=st.integers(1, 70),
    K=st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 769, 2049])),
    dtypes=st.sampled_from([(FULL, FULL), (HALF, HALF), (HALF, FULL)]),
    hows=st.tuples(*[st.sampled_from(["rows", "columns", "slice"])] * 2),
    bias=st.sampled_from([None, FULL, HALF]),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def _any_product(way, M, N, K, dtypes, hows, bias, add, seed):
    check(
        way, M, N, K, dtype=dtypes[0], out_dtype=dtypes[1], a_how=hows[0], b_how=hows[1], bias=bias, add=add, seed=seed
    )


def test_any_product(way):
    _any_product(way)


def test_by_hand(way):
    """[1 2; 3 4] [5 6; 7 8] = [19 22; 43 50]; plus 1 and what was there, 100."""
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    assert way(a, b, torch.empty(2, 2)).tolist() == [[19.0, 22.0], [43.0, 50.0]]
    assert way(a, b, torch.full((2, 2), 100.0), torch.ones(2), True).tolist() == [[120.0, 123.0], [144.0, 151.0]]


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_rows_do_not_depend_on_their_number(dtype):
    if _products._amx() is None:
        pytest.skip("this processor has no AMX tiles, or FASTPPO_AMX=0")
    torch.manual_seed(0)
    a, b = torch.randn(1000, 2600).to(dtype), torch.randn(2600, 70).to(dtype)
    whole, again, part = (torch.empty(n, 70) for n in (1000, 1000, 41))
    on_tiles(a, b, whole), on_tiles(a, b, again), on_tiles(a[100:141], b, part)
    assert torch.equal(whole, again) and torch.equal(whole[100:141], part)


def test_threads_do_not_change_a_bit():
    if _products._amx() is None:
        pytest.skip("this processor has no AMX tiles, or FASTPPO_AMX=0")
    torch.manual_seed(0)
    a, b, made = torch.randn(100, 900), torch.randn(900, 130), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(torch.empty(100, 130))
            on_tiles(a, b, made[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(way, dtype, bad):
    """In its row or column, and nowhere else. On the tiles an infinite float32 factor may give NaN."""
    torch.manual_seed(0)
    a, b = torch.randn(20, 40).to(dtype), torch.randn(40, 50).to(dtype)
    a[3, 7] = b[5, 11] = bad
    finite = way(a, b, torch.empty(20, 50, dtype=dtype)).isfinite()
    wanted = torch.ones(20, 50, dtype=torch.bool)
    wanted[3], wanted[:, 11] = False, False
    assert torch.equal(finite, wanted)


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_extremes(way, dtype):
    """Near the largest and the smallest numbers that products keep exact; denormals count as 0."""
    big, small = torch.full((2, 3), 1e38).to(dtype), torch.full((3, 2), 1e-30).to(dtype)
    truth = big.double() @ small.double()
    torch.testing.assert_close(
        way(big, small, torch.empty(2, 2)).double(), truth, rtol=1e-6 if dtype == FULL else 8e-3, atol=0
    )
    assert way(torch.full((2, 3), 1e-40).to(dtype), torch.ones(3, 2).to(dtype), torch.empty(2, 2)).max() <= 3.1e-40


@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
@pytest.mark.parametrize("add", [False, True])
def test_nothing_to_multiply(sizes, add):
    M, N, K = sizes
    out = mm(torch.randn(M, K), torch.randn(K, N), torch.ones(M, N), add=add)
    assert torch.equal(out, torch.ones(M, N) if add else torch.zeros(M, N))


def test_other_strides_and_dtypes_are_torchs():
    torch.manual_seed(0)
    a, b = torch.randn(300, 600)[:, ::2], torch.randn(300, 400)
    torch.testing.assert_close(mm(a, b), a @ b)
    torch.testing.assert_close(mm(a.double(), b.double()), a.double() @ b.double())
    torch.testing.assert_close(mm(a.contiguous(), b, torch.empty(400, 300).t()), a @ b, atol=1e-4, rtol=1e-4)


def test_without_tiles(monkeypatch):
    """As on another processor."""
    monkeypatch.setattr(_products, "_amx", lambda: None)
    a, b = torch.randn(200, 300), torch.randn(300, 400)
    assert not on_tiles(a, b, torch.empty(200, 400))
    assert torch.equal(mm(a, b), torch.mm(a, b))


def test_wrong_sizes():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        mm(torch.randn(300, 400), torch.randn(401, 500))


@pytest.mark.skipif(_products._amx() is None, reason="this processor has no AMX tiles, or FASTPPO_AMX=0")
@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (0, 0, 7)])
def test_no_rows_or_no_columns_are_nothing_to_do(sizes):
    """mm() gives such products to torch: whoever calls the extension itself must not get a division by zero."""
    out = torch.full((5, 5), 3.0)
    _products._amx()((out.data_ptr(),) * 3 + (0,), (*sizes, 7, 7, 5), 1)
    assert (out == 3).all()
    assert mm(torch.ones(sizes[0], 7), torch.ones(7, sizes[1])).shape == sizes[:2]


@pytest.mark.skipif(_products._amx() is None, reason="this processor has no AMX tiles, or FASTPPO_AMX=0")
def test_sums_of_nothing_are_refused_by_the_tiles_and_zero_by_torch():
    out = torch.full((5, 5), 3.0)
    with pytest.raises(ValueError, match="product: K, the length of the sums, must be at least 1; got 0"):
        _products._amx()((out.data_ptr(),) * 3 + (0,), (5, 5, 0, 1, 1, 5), 1)
    assert (mm(torch.ones(5, 0), torch.ones(0, 5)) == 0).all()
