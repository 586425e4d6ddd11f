"""Output memory that is used again: only when nothing refers to it."""

import torch

from fastppo.kernels import _recycle

SHAPE = (2, 300, 400)  # 0.9 MB: above what malloc keeps


def test_free_memory_comes_back_and_held_memory_does_not():
    first = _recycle.empty("test", SHAPE)
    assert first.shape == SHAPE and first.dtype == torch.float32 and first.is_contiguous()
    address = first.data_ptr()
    assert address % 64 == 0
    row = first.fill_(7.0).unbind()[1][5]  # a view of a view keeps it
    del first
    second = _recycle.empty("test", SHAPE)
    assert second.data_ptr() != address
    second.zero_()
    assert row.tolist() == [7.0] * 400
    address = second.data_ptr()
    array = second.numpy()  # so does NumPy's view
    del second
    assert _recycle.empty("test", SHAPE).data_ptr() != address and not array.any()
    address = _recycle.empty("test", SHAPE).data_ptr()
    assert _recycle.empty("test", SHAPE).data_ptr() == address


def test_other_sizes_and_ops_have_their_own():
    first = _recycle.empty("test", SHAPE)
    assert _recycle.empty("another", SHAPE).data_ptr() != first.data_ptr()
    assert _recycle.empty("test", (3, *SHAPE)).shape == (3, *SHAPE)
    small = [_recycle.empty("small", (4,)) for _ in range(2)]
    assert small[0].data_ptr() != small[1].data_ptr() and "small" not in _recycle._kept
    assert _recycle.empty("test", (0, 5)).shape == (0, 5)


def test_stages_share_and_too_much_is_given_back():
    name = _recycle.SCRATCH
    _recycle.release(name)
    first = _recycle.of_stage(name, (1 << 20,), torch.float32)
    address = first.data_ptr()
    beside = _recycle.of_stage(name, (1 << 20,), torch.uint8)
    assert beside.data_ptr() != address, "held memory is nobody else's"
    del beside, first
    first = _recycle.of_stage(name, (1 << 20,), torch.uint8)  # of what came second, which is smaller
    _recycle.release_over(name, 2 << 20)
    assert first.data_ptr() == _recycle._kept[name].ctypes.data
    _recycle.release_over(name, (1 << 20) - 1)
    assert name not in _recycle._kept and first.zero_().sum() == 0
