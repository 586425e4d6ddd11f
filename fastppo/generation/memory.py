"""How much memory is free."""

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor on `device` could take; 4 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return 4 << 30
