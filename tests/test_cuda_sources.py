"""csrc/cuda/sampling.cu and paged_attention.cu, run on the CPU by tests/cuda_host, through the tests of their rooms.

The launchers take the place of the C++ back end in the rooms' tables, so each case below is the room's own test with its own
bounds. cuda_host/cuda_runtime.h says what such a run does not cover (races, alignment, occupancy, time).
"""

from functools import partial

import cuda_host
import pytest
import test_paged_attention as paged_tests
import test_sampling as sampling_tests
import torch

from fastppo.kernels import _sampling_gpu, paged_attention, sampling
from fastppo.kernels._backend import INTERPRET
from fastppo.kernels._paged_attention_launch import cache_write_cuda_on, paged_attention_cuda_on

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process is for Triton")


@pytest.fixture(autouse=True)
def cuda_in_place_of_cpu(monkeypatch):
    module = cuda_host.build()
    if isinstance(module, str):
        pytest.skip(module)
    attend = paged_attention._decode_only(partial(paged_attention_cuda_on, module, 0))
    monkeypatch.setitem(sampling.BACKEND_TABLE, "cpu", partial(_sampling_gpu.sampling_cuda_on, module, 0))
    monkeypatch.setitem(paged_attention.BACKEND_TABLE, "cpu", lambda q, *a, **o: attend(q, *a, **o).to(q.dtype))
    monkeypatch.setitem(paged_attention.WRITE_TABLE, "cpu", partial(cache_write_cuda_on, module, 0))


@pytest.mark.parametrize("V", sampling_tests.SIZES)
@pytest.mark.parametrize("name", sampling_tests.FILTERS)
def test_sampling_matches_reference(V, name):
    sampling_tests.test_matches_reference("cpu", CPU, V, sampling_tests.FILTERS[name])


@pytest.mark.parametrize(
    "case",
    [
        sampling_tests.test_a_case_worked_out_by_hand,
        sampling_tests.test_history_and_bans,
        sampling_tests.test_greedy_takes_the_lowest_index_on_ties,
        sampling_tests.test_minus_infinity_and_very_negative_logits,
        sampling_tests.test_nothing_left_names_its_row,
        sampling_tests.test_a_row_does_not_depend_on_its_batch,
        sampling_tests.test_seed_and_position_both_count,
        sampling_tests.test_more_than_2_31_elements_by_stride,
        sampling_tests.test_unaligned_seeds_and_positions,
        sampling_tests.test_no_rows,
    ],
    ids=lambda case: case.__name__,
)
def test_sampling(case):
    case("cpu", CPU)


def test_any_case_of_sampling():
    sampling_tests._any_case("cpu", CPU, examples=10)


def test_any_case_of_paged_attention():
    paged_tests._any_case("cpu", CPU, examples=5, longest=30, largest_group=5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_names_its_row(value):
    sampling_tests.test_a_bad_number_names_its_row("cpu", CPU, value, 1299)


@pytest.mark.parametrize("name", ["all", "top-p"])  # top-p: its bound comes from the first pass's sums
def test_frequencies_pass_chi_square(name, monkeypatch):
    monkeypatch.setattr(sampling_tests, "DRAWS", 200)
    sampling_tests.test_frequencies_pass_chi_square("cpu", CPU, sampling_tests.FILTERS[name])


@pytest.mark.parametrize("top_k", [0, 50, 3000])
def test_151936_columns(top_k):
    options = sampling.SamplingOptions(top_k=top_k, top_p=0.95)
    args = sampling_tests.rows(2, 151936, CPU, torch.bfloat16)
    ours = sampling.sampling(*args, options, backend="cpu")
    assert sampling_tests.assert_numbers_close(ours, *args, options).all()


@pytest.mark.parametrize("dtype", paged_tests.DTYPES, ids=str)
@pytest.mark.parametrize("heads", [*paged_tests.HEADS, (9, 1, 32)], ids=str)
def test_decode_matches_reference(heads, dtype, monkeypatch):
    monkeypatch.setattr(paged_tests, "LENS", paged_tests.FEW_LENS)
    paged_tests.test_decode_matches_reference("cpu", CPU, heads, dtype)


@pytest.mark.parametrize(
    "case",
    [
        paged_tests.test_a_case_worked_out_by_hand,
        paged_tests.test_large_scores_do_not_overflow,
        paged_tests.test_strided_queries,
        paged_tests.test_a_cache_of_more_than_2_to_the_31_elements,
        paged_tests.test_queries_and_new_tokens_of_more_than_2_to_the_31_elements,
        paged_tests.test_nothing_to_do,
    ],
    ids=lambda case: case.__name__,
)
def test_paged_attention(case):
    case("cpu", CPU)


def test_chunks_of_queries():
    args, starts = paged_tests.case([5, 70], 8, 2, 16, torch.float32, CPU, [5, 9])
    options = {"scale": 0.3, "cu_seqlens_q": starts, "window": 50}
    paged_tests.assert_exact(paged_attention.paged_attention(*args, **options, backend="cpu"), args, options)


def test_a_query_does_not_depend_on_its_batch():
    args, _ = paged_tests.case([700, 3, 290], 8, 2, 64, torch.bfloat16, CPU)
    q_BHD, k_cache, v_cache, tables_BM, lens_B = args
    together = paged_attention.paged_attention(*args, scale=0.125, backend="cpu")
    alone = paged_attention.paged_attention(
        q_BHD[2:], k_cache, v_cache, tables_BM[2:].contiguous(), lens_B[2:], scale=0.125, backend="cpu"
    )
    assert torch.equal(alone[0], together[2])


def test_caches_that_16_byte_loads_cannot_read_are_refused():
    (q_BHD, *_, tables_BM, lens_B), _ = paged_tests.case([5], 2, 1, 8, torch.float32, CPU)
    caches = torch.zeros(2 * 16 * 8 + 1)[1:].view(2, 16, 1, 8)
    with pytest.raises(RuntimeError, match="paged_attention: .*caches must begin at a multiple of 16 bytes"):
        paged_attention.paged_attention(q_BHD, caches, caches, tables_BM % 2, lens_B, scale=1.0, backend="cpu")


@pytest.mark.parametrize("cache_dtype", paged_tests.DTYPES, ids=str)
def test_cache_write(cache_dtype):
    for dtype in paged_tests.DTYPES:
        paged_tests.test_cache_write("cpu", CPU, dtype, cache_dtype)
