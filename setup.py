"""Build fastppo._C from csrc/ with ninja: C++ always, CUDA when nvcc is found (FASTPPO_BUILD_CUDA=auto|1|0).

The extension includes no torch header (plain pointers in, error text out), so it builds without torch and one
binary serves every torch version. OpenMP's symbols are left undefined on purpose: they bind to the libgomp that
torch has already loaded, so that there is one thread pool in the process, not two that fight for the cores.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CUDA_ARCHS = os.environ.get("FASTPPO_CUDA_ARCHS", "80;90a")
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wno-psabi"


class BuildError(SystemExit):
    """A build failure that the user can act on: printed without a traceback, exit status 1."""

    def __init__(self, text: str):
        super().__init__(f"\nfastppo build error: {text}\n")


def find_compiler() -> str:
    asked = os.environ.get("CXX", "").split()
    name = asked[0] if asked else "c++"
    for candidate in asked[:1] or ["c++", "g++", "clang++"]:
        if shutil.which(candidate):
            return candidate
    raise BuildError(
        f"no C++ compiler found (looked for {name!r} on PATH). Install one, for example "
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


def find_nvcc() -> str | None:
    """nvcc's path, or None; FASTPPO_BUILD_CUDA=0 ignores it and =1 insists on it."""
    wish = os.environ.get("FASTPPO_BUILD_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"FASTPPO_BUILD_CUDA must be auto, 0 or 1; got {wish!r}.")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = ([str(Path(home) / "bin" / "nvcc")] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for path in map(shutil.which, places) if path), None)
    if found is None and wish == "1":
        raise BuildError(
            "FASTPPO_BUILD_CUDA=1 but nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda). "
            "Install the CUDA toolkit, set CUDA_HOME, or build the CPU part alone with FASTPPO_BUILD_CUDA=0."
        )
    return found


def gencode_flags(archs: str) -> str:
    """-gencode flags for '80;90a', plus PTX of the newest portable architecture for GPUs that come later."""
    names = [name.strip() for name in archs.replace(",", ";").split(";") if name.strip()]
    flags = [f"-gencode arch=compute_{name},code=sm_{name}" for name in names]
    portable = [name for name in names if name.isdigit()] or ["80"]
    flags.append(f"-gencode arch=compute_{portable[-1]},code=compute_{portable[-1]}")
    return " ".join(flags)


class NinjaBuildExt(build_ext):
    """Write build.ninja for csrc/ and run it; setuptools then installs the one shared object."""

    def build_extension(self, ext):
        import pybind11

        compiler, ninja, nvcc = find_compiler(), find_ninja(), find_nvcc()
        work = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = sorted((ROOT / "csrc").resolve().glob("*.cpp")) + sorted((ROOT / "csrc/cpu").resolve().glob("*.cpp"))
        kernels = sorted((ROOT / "csrc/cuda").resolve().glob("*.cu")) if nvcc else []
        includes = [ROOT.resolve() / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
        (work / "build.ninja").write_text(ninja_text(compiler, nvcc, sources, kernels, includes, work, target))
        print(
            f"fastppo: {len(sources)} C++ files with {compiler}; "
            + (f"{len(kernels)} CUDA files with {nvcc}" if nvcc else "no CUDA (nvcc not used)")
        )
        ran = subprocess.run(
            [ninja, "-C", str(work), *(["-v"] if os.environ.get("VERBOSE") else [])], capture_output=True, text=True
        )
        sys.stdout.write(ran.stdout[-4000:] if ran.returncode == 0 else ran.stdout[-12000:])
        if ran.returncode:
            cuda_failed = any(
                f"FAILED: {path.stem}.cu.o" in ran.stdout
                or f"{path.stem}.cu.o" in ran.stdout.split("FAILED:")[-1].split("\n")[0]
                for path in kernels
            )
            hint = (
                f"nvcc ({nvcc}) failed, see its message above. A host compiler newer than nvcc supports is the usual cause; "
                "FASTPPO_BUILD_CUDA=0 builds the CPU part alone."
                if cuda_failed
                else f"{compiler} failed, see its message above. fastppo needs a C++17 compiler (g++ 9 or newer)."
            )
            raise BuildError(hint)


def ninja_text(compiler, nvcc, sources, kernels, includes, work, target) -> str:
    include_flags = " ".join(f"-I{path}" for path in includes)
    define = "-DFASTPPO_CUDA" if nvcc else ""
    # No -fopenmp here: see the module docstring. -undefined: macOS refuses undefined symbols unless told.
    link = "-shared" + (" -undefined dynamic_lookup" if platform.system() == "Darwin" else "")
    libs = ""
    if nvcc:
        lib_dir = Path(os.path.realpath(nvcc)).parent.parent
        dirs = [
            d
            for d in (lib_dir / "lib64", lib_dir / "targets/x86_64-linux/lib", Path("/usr/local/cuda/lib64"))
            if d.is_dir()
        ]
        libs = " ".join(f"-L{d}" for d in dirs) + " -lcudart_static -ldl -lrt -lpthread"
    lines = [
        f"rule cxx\n  command = {compiler} {CXX_FLAGS} {define} {include_flags} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} {link} $in -o $out {libs}",
    ]
    if nvcc:
        lines.append(
            f"rule nvcc\n  command = {nvcc} -std=c++17 -O3 --threads 2 {gencode_flags(CUDA_ARCHS)} -Xcompiler -fPIC,-fvisibility=hidden "
            f"-DFASTPPO_CUDA {include_flags} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        )
    objects = []
    for rule, paths in (("cxx", sources), ("nvcc", kernels)):
        for path in paths:
            objects.append(f"{path.parent.name}_{path.stem}{path.suffix}.o")
            lines.append(f"build {objects[-1]}: {rule} {path}")
    lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
    return "\n".join(lines)


PACKAGES = ["fastppo"] + [
    "fastppo." + str(path.parent.relative_to(ROOT / "fastppo")).replace(os.sep, ".")
    for path in sorted((ROOT / "fastppo").glob("*/**/__init__.py"))
]

setup(
    packages=[*PACKAGES, "fastppo.kernels"],
    # kernels/ has no __init__.py and no top-level import name: Hugging Face publishes a package called kernels.
    package_dir={"fastppo": "fastppo", "fastppo.kernels": "kernels"},
    package_data={"fastppo": ["py.typed", "cli/assets/*", "assets/*"]},
    ext_modules=[Extension("fastppo._C", sources=[])],
    cmdclass={"build_ext": NinjaBuildExt},
)
