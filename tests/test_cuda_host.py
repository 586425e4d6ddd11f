"""The executor that runs CUDA kernels on the CPU, checked on kernels whose results are known."""

import cuda_host
import pytest
import torch


@pytest.fixture(scope="module")
def host():
    module = cuda_host.build(self_test=True)
    if isinstance(module, str):
        pytest.skip(module)
    return module


@pytest.mark.parametrize("threads", [32, 96, 128])
def test_barriers_shuffles_and_shared_memory(host, threads):
    x = torch.arange(3 * 1000, dtype=torch.float32).reshape(3, 1000) % 17
    out = torch.full((3,), -1.0)
    host.row_sum(x.data_ptr(), out.data_ptr(), 3, 1000, threads)
    assert torch.equal(out, x.sum(1))


def test_dynamic_shared_memory(host):
    x = torch.arange(70.0)
    host.reverse(x.data_ptr(), 70)
    assert torch.equal(x, torch.arange(70.0).flip(0))


def test_every_shuffle_gives_what_cuda_documents(host):
    out = torch.zeros(5, 32, dtype=torch.int32)
    host.shuffles(out.data_ptr())
    lane = torch.arange(32)
    assert torch.equal(out[0].long(), lane // 8 * 8 + 3)
    assert torch.equal(out[1].long(), lane ^ 5)
    assert torch.equal(out[2].long(), torch.where(lane % 8 < 6, lane + 2, lane))
    assert torch.equal(out[3].long(), torch.where(lane % 8 >= 2, lane - 2, lane))
    want = sum(1 << i for i in range(0, 32, 3))
    assert (out[4].long() & 0xFFFFFFFF == want).all()


def test_a_barrier_that_some_threads_never_reach_is_found(host):
    with pytest.raises(RuntimeError, match="deadlock"):
        host.broken(torch.zeros(1, dtype=torch.int32).data_ptr())


def test_limits_of_a_launch_are_checked(host):
    with pytest.raises(RuntimeError, match="1 to 1024 threads"):
        host.reverse(0, 1025)


def test_the_projects_kernels_compile_for_the_executor():
    module = cuda_host.build()
    if isinstance(module, str):
        pytest.skip(module)
    assert module.built_with_cuda
