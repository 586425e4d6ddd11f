"""The wheel and the sdist hold what the tree holds, and a build that cannot work says what to do.

The failing builds run setup.py on a tiny csrc/ of their own: what is tested is what it finds and says, not our kernels.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked_files() -> set[str]:
    """What git tracks and the disk still has, less dot files."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is not a git checkout: there is no list of the tree's files to compare with")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.split("\0") if name and not any(p.startswith(".") for p in Path(name).parts)]
    return {name for name in files if (ROOT / name).is_file()}


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


# -O0, and an object that was compiled once is not compiled again for the second build of the same sources.
QUICK_COMPILER = """
for a do shift
  case "$a" in -O3) a=-O0;; *.cpp) source="$a";; esac
  [ "$last" = -o ] && out="$a"; last="$a"; set -- "$@" "$a"
done
[ -z "$source" ] && exec {compiler} "$@"
object={cache}/$(basename "$(dirname "$source")")_$(basename "$source").o
[ -f "$object" ] || {compiler} "$@" || exit 1
[ -f "$object" ] || cp "$out" "$object"
cp "$object" "$out"; echo "$out:" > "$out.d"
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist, of the tree as it stands.

    No optimisation and no CUDA, for speed: this is about which files go where; .ci/run installs the real thing.
    """
    folder = tmp_path_factory.mktemp("built")
    script(folder / "quick-c++", QUICK_COMPILER.format(compiler=shutil.which("c++") or "g++", cache=folder))
    tree = folder / "tree"
    for name in tracked_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    env = {**os.environ, "CXX": str(folder / "quick-c++"), "FASTPPO_BUILD_CUDA": "0"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return folder


def test_the_sdist_is_the_tree(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files = {name for name in names if not name.startswith("fastppo.egg-info")} - {"PKG-INFO", "setup.cfg"}
    folders = {str(parent) for name in files for parent in Path(name).parents}
    assert files - folders == tracked_files()


def test_the_wheel_is_the_package(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    tree = {name for name in tracked_files() if name.startswith("fastppo/")}
    rooms = {f"fastppo/{name}" for name in tracked_files() if name.startswith("kernels/")}
    extension = {name for name in names if name.startswith("fastppo/_C.") and name.endswith(".so")}
    assert len(extension) == 1
    assert names - extension == tree | rooms
    assert "fastppo = fastppo.cli:main" in entry_points


def install(tmp_path: Path, *what: str) -> Path:
    """A fresh environment that sees this one's libraries but not its fastppo, with `what` installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    # A path in a .pth file is not searched for .pth files itself: an editable fastppo of this environment stays out.
    (site / "libraries.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--force-reinstall"]
    ran = subprocess.run([*pip, "--no-build-isolation", *what], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return python


IMPORT = """
import importlib.util, pathlib, fastppo, fastppo.kernels
spec = importlib.util.find_spec("kernels")
assert spec is None or (spec.origin and "site-packages" in spec.origin), f"top-level kernels: {spec}"
from fastppo.kernels import _backend
extension = _backend.extension()
assert not isinstance(extension, str), extension
print(pathlib.Path(fastppo.__file__).parent, pathlib.Path(_backend.__file__).parent, extension.built_with_cuda)
"""


def imported(python: Path, folder: Path) -> tuple[Path, Path, str]:
    ran = subprocess.run([python, "-c", IMPORT], capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    package, kernels, cuda = ran.stdout.split()
    return Path(package), Path(kernels), cuda


def test_an_installed_wheel_imports_and_has_no_top_level_kernels(built, tmp_path):
    python = install(tmp_path, str(next(built.glob("*.whl"))))
    package, kernels, cuda = imported(python, tmp_path)
    assert package.is_relative_to(tmp_path / "venv") and kernels == package / "kernels" and cuda == "False"
    assert sorted(path.name for path in package.parent.glob("[!_]*") if path.is_dir()) == [
        "fastppo",
        f"fastppo-{version()}.dist-info",
    ]
    ran = subprocess.run([tmp_path / "venv/bin/fastppo", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.split() == ["fastppo", version()], ran.stderr


def test_an_editable_install_uses_the_checkout(built, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(built / "quick-c++"))
    monkeypatch.setenv("FASTPPO_BUILD_CUDA", "0")
    python = install(tmp_path, "-e", str(built / "tree"))
    package, kernels, _ = imported(python, tmp_path)
    assert (package, kernels) == (built / "tree/fastppo", built / "tree/kernels")


def version() -> str:
    import fastppo

    return fastppo.__version__


# --- builds that cannot work ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A checkout with this setup.py and one C++ and one CUDA file."""
    for folder in ("csrc/cpu", "csrc/cuda", "fastppo", "kernels"):
        (tmp_path / "tiny" / folder).mkdir(parents=True)
    shutil.copy2(ROOT / "setup.py", tmp_path / "tiny")
    (tmp_path / "tiny/csrc/one.cpp").write_text("int one() { return 1; }\n")
    (tmp_path / "tiny/csrc/cuda/two.cu").write_text("int two() { return 2; }\n")
    return tmp_path / "tiny"


def build(folder: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH", "FASTPPO_BUILD_CUDA")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "temp", "--build-lib", "lib"]
    return subprocess.run(command, cwd=folder, env={**clean, **env}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"PATH": "/nowhere", "FASTPPO_BUILD_CUDA": "0"}, r"no C\+\+ compiler found .*apt-get install g\+\+"),
        ({"CXX": "g++-99 -m64"}, "CXX='g.*-99 -m64', which is not on PATH"),
        ({"FASTPPO_BUILD_CUDA": "yes"}, "FASTPPO_BUILD_CUDA must be auto, 0 or 1; got 'yes'"),
        ({"FASTPPO_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nvcc was not found .*/nowhere.*FASTPPO_BUILD_CUDA=0"),
    ],
)
def test_what_is_missing_is_named(tiny, env, wanted):
    ran = build(tiny, **env)
    assert ran.returncode == 1
    assert re.search("(?s)fastppo build error: .*" + wanted, ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr


def toolkit(folder: Path, nvcc: str) -> str:
    """A CUDA_HOME whose nvcc is this shell script."""
    (folder / "toolkit/bin").mkdir(parents=True)
    script(folder / "toolkit/bin/nvcc", nvcc)
    return str(folder / "toolkit")


def test_a_failing_nvcc_stops_the_build_and_says_how_to_go_on(tiny):
    home = toolkit(tiny, "echo 'error: unsupported GNU version!' >&2; exit 2\n")
    ran = build(tiny, CUDA_HOME=home)
    assert ran.returncode == 1
    assert "unsupported GNU version" in ran.stdout
    assert f"nvcc ({home}/bin/nvcc) failed" in ran.stderr and "FASTPPO_BUILD_CUDA=0" in ran.stderr
    assert build(tiny, CUDA_HOME=home, FASTPPO_BUILD_CUDA="0").returncode == 0


def test_wrong_architectures_are_refused(tiny):
    ran = build(tiny, CUDA_HOME=toolkit(tiny, "exit 0\n"), FASTPPO_CUDA_ARCHS="hopper")
    assert ran.returncode == 1 and "FASTPPO_CUDA_ARCHS must be numbers like '80;90a'; got 'hopper'" in ran.stderr


def test_a_cpp_error_is_shown_with_the_compiler_that_made_it(tiny):
    (tiny / "csrc/one.cpp").write_text("int one() { return nonsense; }\n")
    ran = build(tiny, FASTPPO_BUILD_CUDA="0")
    assert ran.returncode == 1
    assert "nonsense" in ran.stdout and "c++ failed" in ran.stderr and "C++17" in ran.stderr


def test_a_toolkit_without_its_runtime_fails_at_the_link_with_a_way_out(tiny):
    fake = 'while [ "$1" != -o ]; do shift; done\necho "int two() { return 2; }" | c++ -x c++ -c - -o "$2"\n'
    home = toolkit(tiny, fake)
    linker = script(
        tiny / "c++", 'case "$*" in *-shared*) echo "cannot find -lcudart_static"; exit 1;; esac\nexec g++ "$@"\n'
    )
    ran = build(tiny, CUDA_HOME=home, CXX=str(linker))
    assert ran.returncode == 1 and "cannot find -lcudart_static" in ran.stdout
    assert f"linking with {linker} failed" in ran.stderr and "FASTPPO_BUILD_CUDA=0" in ran.stderr


def test_a_folder_with_a_space_and_a_colon_builds(tiny):
    odd = tiny.rename(tiny.parent / "my repo: 2")
    ran = build(odd, FASTPPO_BUILD_CUDA="0")
    assert ran.returncode == 0 and list(odd.glob("lib/fastppo/_C.*.so")), ran.stdout + ran.stderr


def test_an_extension_older_than_its_sources_says_how_to_rebuild():
    import types

    from fastppo.kernels._backend import explains_itself

    old = explains_itself(types.ModuleType("fastppo._C"))
    with pytest.raises(AttributeError, match=r"fastppo._C has no 'new_op'.*rebuild it: pip install -e \."):
        old.new_op  # noqa: B018
    assert not hasattr(old, "new_op")
