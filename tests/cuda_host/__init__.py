"""The CUDA kernels' own source, run on the CPU: csrc/cuda/*.cu compiled by the C++ compiler against stand-in headers.

cuda_runtime.h beside this file says what that covers and what it does not.
"""

import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent


@functools.cache
def build(self_test: bool = False) -> ModuleType | str:
    """The module with every CUDA launcher for CPU addresses, or in words why it cannot be built here.

    self_test: instead of csrc/cuda, compile the kernels that check the executor itself.
    Raises RuntimeError with the compiler's words when a source does not compile.
    """
    import pybind11

    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler"
    name = "_cuda_host_self_test" if self_test else "_cuda_host"
    kernels = [HERE / "self_test.cu"] if self_test else sorted((ROOT / "csrc/cuda").glob("*.cu"))
    plain = [HERE / "executor.cpp"] + ([] if self_test else [HERE / "module.cpp", ROOT / "csrc/bindings_cuda.cpp"])
    parts = [*kernels, *plain, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.h")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(parts))).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"fastppo{name}_{key}" / f"{name}.so"
    if not target.exists():
        includes = [HERE, ROOT / "csrc", ROOT / "csrc/cuda", pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w", "-DFASTPPO_CUDA", "-DFASTPPO_CUDA_HOST"]
        flags += [f"-I{path}" for path in includes]
        target.parent.mkdir(exist_ok=True)
        objects = []
        for path in [*kernels, *plain]:
            objects.append(target.parent / f"{path.stem}.o")
            language = ["-x", "c++"] if path.suffix == ".cu" else []
            _run([compiler, *flags, *language, "-c", str(path), "-o", str(objects[-1])])
        _run([compiler, "-shared", *map(str, objects), "-o", f"{target}.new"])
        Path(f"{target}.new").rename(target)
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stderr[-6000:]}")
