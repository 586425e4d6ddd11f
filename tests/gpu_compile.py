"""Compile GPU kernels without a GPU and read what the compiler made of them: registers, shared and local memory, SASS."""

import functools
import importlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes a block may have: CUDA C++ programming guide, compute capabilities
FP64 = re.compile(r"\b(DADD|DFMA|DMUL|DSETP|F2F\.F64\S*|F2F\.F32\.F64|I2F\.F64\S*)\b")
LOCAL = re.compile(r"\b(LDL|STL)(\.\S+)?\b")
# "%z = arith.muli %x, %y : tensor<16x1xi32> loc(..)" in Triton's own intermediate code
PRODUCT = re.compile(r"arith\.muli (\S+), (\S+) : (?:tensor<[\dx]+)?i32\b")


@dataclass(frozen=True)
class TritonCase:
    """One Triton kernel as it is launched on a GPU.

    kernel: "module:function". types: Triton types of its run-time arguments, in order, separated by spaces ("*bf16 i32 fp32").
    constexprs: the rest. sixteens: integer arguments that are multiples of 16 in a usual launch, as triton's launcher finds out by itself;
    wants_80, wants_90: instructions (regular expressions) that its SASS must hold. archs: where it runs.
    label: what tells cases of one kernel apart. warps, stages: as launched.
    """

    kernel: str
    types: str
    constexprs: dict
    warps: int = 4
    stages: int = 3
    sixteens: tuple[str, ...] = ()
    wants_80: tuple[str, ...] = ()
    wants_90: tuple[str, ...] = ()
    label: str = ""
    archs: tuple[int, ...] = (80, 90)

    @property
    def name(self) -> str:
        kind = self.types.split()[0].removeprefix("*")
        words = [self.label] if kind.startswith("tensordesc") else [kind, self.label]
        return f"{self.kernel.split(':')[1]}[{' '.join(filter(None, words))}]"


@dataclass(frozen=True)
class Compiled:
    """name: kernel. arch: 80 or 90. registers per thread; shared and local: bytes (local: per thread). sass: its text.

    narrow: products of two run-time numbers that are 32 bits wide (Triton only).
    """

    name: str
    arch: int
    registers: int
    shared: int
    local: int
    sass: str
    narrow: tuple[str, ...] = ()

    @property
    def faults(self) -> list[str]:
        """What no kernel of ours may have, in words."""
        found = []
        if self.local or LOCAL.search(self.sass):
            found.append(f"{self.local} bytes of local memory (spills or indexed arrays)")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory; sm_{self.arch} has {SHARED_LIMIT[self.arch]}")
        if fp64 := FP64.search(self.sass):
            found.append(f"float64 arithmetic: {fp64.group()}")
        if self.narrow:
            found.append(f"row * stride overflows 32 bits past 2^31 elements, convert one to int64: {self.narrow}")
        return found

    def missing(self, wants: tuple[str, ...]) -> list[str]:
        return [want for want in wants if not re.search(want, self.sass)]


def triton_tool(name: str) -> str:
    """cuobjdump of the triton wheel, or of the CUDA toolkit."""
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if not found:
        raise RuntimeError(f"neither triton's wheel nor PATH has {name}")
    return found


def resource_usage(cubin: Path) -> dict[str, dict[str, int]]:
    """kernel -> {"REG": ..., "STACK": ..., "SHARED": ..., "LOCAL": ...} of a cubin file."""
    text = _output([triton_tool("cuobjdump"), "-res-usage", str(cubin)])
    found = {}
    for name, line in re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", text):
        found[name] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def sass_by_kernel(cubin: Path) -> dict[str, str]:
    text = _output([triton_tool("cuobjdump"), "-sass", str(cubin)])
    parts = re.split(r"\n\s*Function : (\S+)\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def narrow_products(ttir: str) -> tuple[str, ...]:
    """32-bit products neither of whose factors is a constant: an offset among them overflows past 2^31 elements."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    return tuple(found[0] for found in PRODUCT.finditer(ttir) if not {found[1], found[2]} & constants)


def compile_triton(case: TritonCase, arch: int, folder: Path) -> Compiled:
    """Compile one case for sm_<arch>; raises with Triton's own words when it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    runtime = [arg for arg in kernel.arg_names if arg not in case.constexprs]
    types = case.types.split()
    if len(runtime) != len(types):
        raise ValueError(f"{case.kernel} takes {runtime} besides its constexprs; the registry gives {types}")
    signature = {a: "constexpr" if a in case.constexprs else types[runtime.index(a)] for a in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if signature[a].startswith("*") or a in case.sixteens
    }
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=case.constexprs, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / f"{name}_{arch}.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage, sass = resource_usage(cubin), sass_by_kernel(cubin)
    (found,) = usage.values()
    shared = max(made.metadata.shared, found["SHARED"])
    local, text = found["LOCAL"] + found["STACK"], "\n".join(sass.values())
    return Compiled(case.name, arch, found["REG"], shared, local, text, narrow_products(made.asm["ttir"]))


@functools.cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, places) if path), None)


def compile_cuda(source: Path, arch: int, folder: Path) -> list[Compiled]:
    """Every kernel of one .cu file for sm_80 or sm_90a."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    name = {80: "sm_80", 90: "sm_90a"}[arch]
    flags = [
        "-std=c++17",
        "-O3",
        f"-arch={name}",
        "-cubin",
        "-DFASTPPO_CUDA",
        f"-I{ROOT / 'csrc'}",
        f"-I{source.parent}",
    ]
    _output([nvcc(), *flags, str(source), "-o", str(cubin)])
    usage, sass = resource_usage(cubin), sass_by_kernel(cubin)
    return [
        Compiled(demangle(kernel), arch, found["REG"], found["SHARED"], found["LOCAL"] + found["STACK"], sass[kernel])
        for kernel, found in usage.items()
    ]


def demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    text = _output([tool, "-p", name]).strip() if tool else name
    return text.replace("fastppo::", "").replace("(anonymous namespace)::", "")


def table(rows: list[Compiled]) -> str:
    """Registers and memory of every kernel, for the test's output."""
    lines = [f"{'kernel':64} {'arch':>5} {'regs':>5} {'shared B':>9} {'local B':>8}"]
    lines += [f"{r.name[:64]:64} sm_{r.arch} {r.registers:5} {r.shared:9} {r.local:8}" for r in rows]
    return "\n".join(lines)


def _output(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}")
    return ran.stdout
