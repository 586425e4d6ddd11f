"""Choose which back end runs an op: the one asked for, or else the first that can. The only file that knows."""

import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def extension() -> ModuleType | str:
    """The compiled module fastppo._C, or in words why there is none.

    Its OpenMP symbols bind to the libgomp that torch has loaded; where torch brings none, the system's is loaded first.
    """
    try:
        return explains_itself(importlib.import_module("fastppo._C"))
    except ModuleNotFoundError:
        return "the extension fastppo._C was not built (run 'pip install .' or 'python setup.py build_ext --inplace')"
    except ImportError as error:
        if "omp" not in str(error).lower():
            return f"the extension fastppo._C does not load: {error}"
    try:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return explains_itself(importlib.import_module("fastppo._C"))
    except (ImportError, OSError) as error:
        return f"the extension fastppo._C does not load: {error}"


def explains_itself(module: ModuleType) -> ModuleType:
    """The module, whose missing names say why they are missing: it was compiled before the Python beside it was pulled."""

    def __getattr__(name: str):
        raise AttributeError(
            f"{module.__name__} has no {name!r}: the compiled extension ({vars(module).get('__file__', 'in memory')}) is older "
            "than these sources; rebuild it: pip install -e ."
        )

    module.__getattr__ = __getattr__
    return module


@functools.cache
def triton_missing() -> str | None:
    """Why triton cannot be imported, in words; None when it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


def missing(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device`, in words; None when it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if why := triton_missing():
            return why
        ok = device.type == "cuda" or INTERPRET
        return (
            None
            if ok
            else f"it needs a CUDA tensor (or TRITON_INTERPRET=1 set before Python starts), got one on {device}"
        )
    if backend in ("cpu", "cuda"):
        if isinstance(extension(), str):
            return extension()
        if backend == "cuda" and not extension().built_with_cuda:
            return "the extension was built without nvcc (set FASTPPO_BUILD_CUDA=1 and install again)"
        return None if device.type == backend else f"it needs a {backend.upper()} tensor, got one on {device}"
    return f"there is no such back end; there are {', '.join(BACKENDS)}"


def pick(op: str, table: Mapping[str, Callable], device: torch.device, asked: str | None) -> Callable:
    """Return the entry of `table` (best first) to run; an explicit request never falls back.

    `asked` comes from the caller's backend= argument; FASTPPO_BACKEND does the same for the whole process.
    Raises RuntimeError when the back end asked for cannot run here, with the reason.
    """
    asked = asked or os.environ.get("FASTPPO_BACKEND")
    if asked is None:
        able = (name for name in table if not (INTERPRET and name == "triton") and missing(name, device) is None)
        return on_device(table[next(able)], device)
    why = missing(asked, device) if asked in table else f"{op} has only {', '.join(table)}"
    if why is not None:
        raise RuntimeError(f"{op}: backend {asked!r} was asked for but {why}")
    return on_device(table[asked], device)


def on_device(run: Callable, device: torch.device) -> Callable:
    """`run`, with `device` the current one during the call where another GPU is: a launch goes to the current GPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return run

    def on_another(*args, **kwargs):
        with torch.cuda.device(device):
            return run(*args, **kwargs)

    return on_another
