"""Build fastppo._C from csrc/ with ninja: C++ always, CUDA when nvcc is found (FASTPPO_BUILD_CUDA=auto|1|0).

The extension includes no torch header (plain pointers in, error text out), so it builds without torch and one
binary serves every torch version. OpenMP's symbols are left undefined on purpose: they bind to the libgomp that
torch has already loaded, so that there is one thread pool in the process, not two that fight for the cores.

Read from the environment: CXX, CUDA_HOME (or CUDA_PATH), FASTPPO_BUILD_CUDA, FASTPPO_CUDA_ARCHS, MAX_JOBS, VERBOSE.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wno-psabi"
NVCC_FLAGS = "-std=c++17 -O3 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden -DFASTPPO_CUDA"


class BuildError(SystemExit):
    """A build failure that the user can act on: printed without a traceback, exit status 1."""

    def __init__(self, text: str):
        super().__init__(f"\nfastppo build error: {text}\n")


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX (which may be several words, as in 'ccache g++'), or the first that is there."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    looked = f"CXX={shlex.join(asked)!r}, which is not on PATH" if asked else "c++, g++ and clang++ on PATH"
    raise BuildError(
        f"no C++ compiler found (looked for {looked}). Install one, for example with "
        "'apt-get install g++' or 'conda install gxx_linux-64', or set CXX to yours."
    )


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found:
            return found
    raise BuildError(
        "ninja not found. Install it with 'pip install ninja' (an isolated 'pip install .' does so by itself)."
    )


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildError(
            "pybind11 not found. Install it with 'pip install pybind11' (an isolated 'pip install .' does so by itself)."
        ) from None
    return pybind11.get_include()


def python_include() -> str:
    folder = sysconfig.get_paths()["include"]
    if not (Path(folder) / "Python.h").is_file():
        raise BuildError(
            f"Python's headers are missing ({folder}/Python.h). Install them, for example with "
            f"'apt-get install python3-dev' or 'conda install python={sys.version_info.major}.{sys.version_info.minor}'."
        )
    return folder


def find_nvcc() -> str | None:
    """nvcc's path, or None; FASTPPO_BUILD_CUDA=0 ignores it and =1 insists on it."""
    wish = os.environ.get("FASTPPO_BUILD_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"FASTPPO_BUILD_CUDA must be auto, 0 or 1; got {wish!r}.")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # CUDA_HOME is the user's word: where it is set and empty of an nvcc, another toolkit must not slip in.
    places = [str(Path(home) / "bin/nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for path in map(shutil.which, places) if path), None)
    if found is None and wish == "1":
        raise BuildError(
            f"FASTPPO_BUILD_CUDA=1 but nvcc was not found (looked for {' and '.join(places)}). Install the CUDA "
            "toolkit, set CUDA_HOME to its folder, or build the CPU part alone with FASTPPO_BUILD_CUDA=0."
        )
    return found


def gencode_flags() -> str:
    """-gencode flags for FASTPPO_CUDA_ARCHS, plus PTX of the newest portable one for GPUs that come later."""
    archs = os.environ.get("FASTPPO_CUDA_ARCHS", "80;90a")
    names = [name.strip() for name in archs.replace(",", ";").split(";") if name.strip()]
    wrong = [name for name in names if not name.removesuffix("a").removesuffix("f").isdigit()]
    if wrong or not names:
        raise BuildError(f"FASTPPO_CUDA_ARCHS must be numbers like '80;90a'; got {archs!r}.")
    portable = [name for name in names if name.isdigit()] or ["80"]
    flags = [f"-gencode arch=compute_{name},code=sm_{name}" for name in names]
    return " ".join([*flags, f"-gencode arch=compute_{portable[-1]},code=compute_{portable[-1]}"])


def cuda_libraries(nvcc: str) -> str:
    """Link flags for the static CUDA runtime: the binary then needs nothing but the driver."""
    home = Path(os.path.realpath(nvcc)).parent.parent
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib")), Path("/usr/local/cuda/lib64")]
    with_runtime = [folder for folder in folders if (folder / "libcudart_static.a").is_file()]
    return " ".join([*(f"-L{shlex.quote(str(f))}" for f in with_runtime), "-lcudart_static -ldl -lrt -lpthread"])


def in_ninja(path: object) -> str:
    """A path as ninja's build lines want it: a space or a colon in a folder's name would end the word."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(compiler: list[str], nvcc: str | None, target: Path) -> str:
    """build.ninja: one rule per compiler, one object per source, one shared object."""
    folders = [ROOT / "csrc", pybind11_include(), python_include()]
    includes = " ".join(f"-I{shlex.quote(str(folder))}" for folder in folders).replace("$", "$$")
    cxx, define = shlex.join(compiler).replace("$", "$$"), "-DFASTPPO_CUDA" if nvcc else ""
    deps = "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    # No -fopenmp in the link: see the module's docstring. macOS refuses undefined symbols unless told.
    link = "-shared" + (" -undefined dynamic_lookup" if platform.system() == "Darwin" else "")
    sources = [("cxx", path) for folder in ("csrc", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))]
    lines = [
        f"rule cxx\n  command = {cxx} {CXX_FLAGS} {define} {includes} {deps}",
        f"rule link\n  command = {cxx} {link} $in -o $out {cuda_libraries(nvcc) if nvcc else ''}",
    ]
    if nvcc:
        lines.append(f"rule nvcc\n  command = {shlex.quote(nvcc)} {NVCC_FLAGS} {gencode_flags()} {includes} {deps}")
        sources += [("nvcc", path) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    objects = [f"{path.parent.name}_{path.name}.o" for _, path in sources]
    lines += [f"build {o}: {rule} {in_ninja(path)}" for o, (rule, path) in zip(objects, sources, strict=True)]
    return "\n".join([*lines, f"build {in_ninja(target)}: link {' '.join(objects)}", ""])


def advice(output: str, compiler: list[str], nvcc: str | None) -> str:
    """What to do about ninja's output: nvcc, the linker and the C++ compiler fail for different reasons."""
    failed = " ".join(line for line in output.splitlines() if line.startswith("FAILED:"))
    if ".cu.o" in failed:
        return (
            f"nvcc ({nvcc}) failed, see its message above. A host compiler newer than this nvcc supports is the usual "
            "cause (set NVCC_CCBIN to an older one); FASTPPO_BUILD_CUDA=0 builds the CPU part alone."
        )
    if ".cpp.o" in failed:
        return f"{shlex.join(compiler)} failed, see its message above. fastppo needs a C++17 compiler (g++ 9 or newer)."
    without_cuda = " FASTPPO_BUILD_CUDA=0 builds without the CUDA runtime." if nvcc else ""
    return f"linking with {shlex.join(compiler)} failed, see its message above.{without_cuda}"


class NinjaBuildExt(build_ext):
    """Write build.ninja for csrc/ and run it; setuptools then installs the one shared object."""

    def build_extension(self, ext):
        compiler, ninja, nvcc = find_compiler(), find_ninja(), find_nvcc()
        work = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_text(compiler, nvcc, target))
        print(f"fastppo: building with {shlex.join(compiler)} and " + (nvcc or "without CUDA (nvcc not used)"))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        verbose = ["-v"] if os.environ.get("VERBOSE") else []
        ran = subprocess.run([ninja, "-C", str(work), *jobs, *verbose], capture_output=True, text=True)
        output = ran.stdout + ran.stderr
        sys.stdout.write(output[-12000:] if ran.returncode else output[-4000:])
        sys.stdout.flush()
        if ran.returncode:
            raise BuildError(advice(output, compiler, nvcc))


PACKAGES = ["fastppo"] + [
    ".".join(path.parent.relative_to(ROOT).parts) for path in sorted((ROOT / "fastppo").glob("*/**/__init__.py"))
]

setup(
    packages=[*PACKAGES, "fastppo.kernels"],
    # kernels/ has no __init__.py and no top-level import name: Hugging Face publishes a package called kernels.
    package_dir={"fastppo": "fastppo", "fastppo.kernels": "kernels"},
    ext_modules=[Extension("fastppo._C", sources=[])],
    cmdclass={"build_ext": NinjaBuildExt},
)
