"""Gates on what the GPU compilers make of every kernel: no spills, no float64, shared memory that fits, the instructions
that the kernel is meant to use. Runs without a GPU.

FASTPPO_GPU_TABLE=docs/gpu_notes.md writes the table of registers and memory between that file's markers as well.
"""

import os
import re

import pytest
from gpu_compile import ROOT, Compiled, compile_cuda, compile_triton, narrow_products, nvcc, table
from gpu_registry import CUDA_WANTS, TRITON

CUDA_SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's process compiles nothing"
)
rows: list[Compiled] = []
MARKERS = ("<!-- registers: begin -->", "<!-- registers: end -->")


@pytest.fixture(scope="module", autouse=True)
def printed_table(request):
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        text = table(sorted(rows, key=lambda row: (row.name, row.arch)))
        print("\n" + text)
    if name := os.environ.get("FASTPPO_GPU_TABLE"):
        path = ROOT / name
        before, _, rest = path.read_text().partition(MARKERS[0])
        path.write_text(f"{before}{MARKERS[0]}\n```\n{text}\n```\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}")


@pytest.mark.parametrize(
    ("case", "arch"),
    [pytest.param(case, arch, id=f"{case.name}-{arch}") for case in TRITON for arch in case.archs],
)
def test_triton_kernel(case, arch, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    made = compile_triton(case, arch, tmp_path)
    rows.append(made)
    assert not made.faults, f"{made.name} on sm_{arch}: {made.faults}"
    wants = {80: case.wants_80, 90: case.wants_90}[arch]
    assert not made.missing(wants), f"{made.name} on sm_{arch}: its SASS has no {made.missing(wants)}"


def cuda_kernels(source) -> set[str]:
    return set(re.findall(r"__global__[\w\s(),]*?\b(\w+_kernel)\(", source.read_text()))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda source: source.stem)
def test_cuda_source(source, arch, tmp_path):
    pytest.importorskip("triton", reason="triton's wheel brings cuobjdump, which reads the compiled kernels")
    if nvcc() is None:
        pytest.skip("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
    kernels = compile_cuda(source, arch, tmp_path)
    rows.extend(kernels)
    faults = {kernel.name: kernel.faults for kernel in kernels if kernel.faults}
    assert kernels and not faults, f"{source.name} on sm_{arch}: {faults}"
    unmet = {kernel.name: kernel.missing(CUDA_WANTS[kernel.name.split("<")[0]]) for kernel in kernels}
    assert not any(unmet.values()), f"{source.name} on sm_{arch}, missing in SASS: {unmet}"
    assert {kernel.name.split("<")[0] for kernel in kernels} == cuda_kernels(source), "a kernel that nothing launches"


def test_every_kernel_is_registered():
    """A kernel that is launched and not in the registry is not checked by anything: Triton's by kernel[grid](..), CUDA's by __global__."""
    listed = {case.kernel.split(":")[1] for case in TRITON}
    sources = [path for folder in ("kernels", "fastppo") for path in sorted((ROOT / folder).rglob("*.py"))]
    launched, jitted = set(), set()
    for path in sources:
        text = path.read_text()
        launched |= set(re.findall(r"\b(\w+)\[\([^\n]*\)\]\(", text))
        jitted |= set(re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", text))
    kernels = {name for name in jitted if name.endswith("_kernel")}
    assert launched & jitted == kernels == listed, (
        "name a kernel .._kernel, launch it, and add it to tests/gpu_registry.py"
    )
    assert set().union(*map(cuda_kernels, CUDA_SOURCES)) == set(CUDA_WANTS)
    inline = [path.name for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cuh", ".h", ".cpp")]
    assert not [name for name in inline if "__global__" in next((ROOT / "csrc").rglob(name)).read_text()]


def test_the_notes_have_every_kernel():
    """docs/gpu_notes.md's table is written by a run of this file; a kernel that came later is missing from it."""
    table = (ROOT / "docs/gpu_notes.md").read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    rows = {tuple(line[:71].rsplit(None, 1)) for line in table.splitlines() if " sm_" in line}
    shown = {(name.strip(), arch) for name, arch in rows}
    assert {(case.name[:64], f"sm_{arch}") for case in TRITON for arch in case.archs} <= shown
    assert {name.split("<")[0] for name, _ in shown if "[" not in name} == set(CUDA_WANTS)


def test_the_gates_catch_a_spill_and_float64():
    bad = Compiled("k", 90, 255, 300_000, 16, "STL [R1], R2 ; DFMA R2, R2, R4, R6 ;")
    assert len(bad.faults) == 3 and bad.missing((r"\bHGMMA\b",)) == [r"\bHGMMA\b"]
    assert not Compiled("k", 90, 40, 1024, 0, "LDG.E.128 R4, [R2.64] ;").faults


def test_the_gate_sees_32_bit_offsets():
    """A product with a constant is one dimension's coordinate; one of two run-time numbers is an offset, or may be."""
    ttir = """%c-5_i32 = arith.constant -5 : i32
    %a = arith.muli %pid, %c-5_i32 : i32 loc(#loc1)
    %b = arith.muli %row, %stride : i64 loc(#loc1)
    %c = arith.muli %pid, %stride : i32 loc(#loc1)
    %d = arith.muli %x, %y : tensor<16x1xi32> loc(#loc1)"""
    assert len(narrow_products(ttir)) == 2
    assert Compiled("k", 90, 40, 0, 0, "", narrow_products(ttir)).faults
