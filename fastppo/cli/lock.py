"""One run at a time in a folder: a second command there would write between the first one's lines."""

import contextlib
import os
from pathlib import Path
from typing import Any

from fastppo.cli.errors import UserError

_held: dict[str, int] = {}


def hold(folder: Path) -> None:
    """Keep other processes' runs out of `folder` until `release` or this process's end, however it ends.

    Raises UserError while another process holds it. File systems without locks let everyone in.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    name = os.path.realpath(folder)
    if name in _held:
        return
    handle = os.open(name, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(
            f"{folder}: another run is writing to this folder. Wait for it, stop it, or choose another --output-dir."
        ) from error
    except OSError:
        os.close(handle)
        return
    _held[name] = handle


def on_cpus_alone() -> bool:
    """Whether a launcher started several processes on a machine without a GPU: accelerate joins these only when told."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return False
    import torch

    return not torch.accelerator.is_available()


def joined() -> Any:
    """accelerate's PartialState of this process, one of those of its launch."""
    from accelerate import PartialState

    return PartialState(cpu=True) if on_cpus_alone() and not PartialState._shared_state else PartialState()


def release() -> None:
    """Let go of every folder that this process holds."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.popitem()[1])
