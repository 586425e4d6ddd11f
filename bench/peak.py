"""Extra memory of a call: how far the resident (CPU) or allocated (GPU) memory rises above where it stood before."""

import gc
import threading
import time
from pathlib import Path

import torch

from fastppo.kernels import _recycle


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def extra_mib(fn, device: torch.device, results_bytes: int) -> float:
    """Peak MiB during fn() beyond before it, less `results_bytes` that fn returns. On a CPU sampled every millisecond."""
    gc.collect()
    _recycle.release()  # what an earlier call kept would not rise again
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - results_bytes) / 2**20
    before, peak, done = _resident_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], _resident_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = fn()
    done.set()
    watcher.join()
    del kept
    return (peak[0] - before - results_bytes) / 2**20
