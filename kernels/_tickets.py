"""The counter by which the last block of a launch knows itself: it is 0 before and after every launch."""

import torch

_KEPT: dict[tuple[torch.device, int], torch.Tensor] = {}


def current_stream(device: torch.device) -> int:
    """The handle of the stream that a launch on `device` goes to; 0 where there is none (the interpreter)."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def ticket(device: torch.device, stream: int) -> torch.Tensor:
    """int32 [1], kept for the device and stream: launches that share it must follow each other.

    One that is made while a CUDA graph is captured is not kept: it is zero after a replay only, and lies in the graph's memory.
    """
    kept = _KEPT.get((device, stream))
    if kept is None:
        kept = torch.zeros(1, dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _KEPT[device, stream] = kept
    return kept
