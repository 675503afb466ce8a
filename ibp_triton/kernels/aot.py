"""Ahead-of-time compilation: what the compiler makes of a launch, for a chip that need not be there.

A recorded launch holds its kernel, its arguments and its tile; from these alone the kernel is compiled as the launch
would have compiled it, and the result is read: registers and spills from the machine code, matrix instructions and
load widths from the assembly. These are static facts, not measurements.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ibp_triton.kernels.launch import Launch


@dataclass(frozen=True)
class Chip:
    """What bounds a kernel on one chip family (vendors' documentation)."""

    target: GPUTarget
    shared: int  # bytes that one program may use
    shared_total: int  # bytes of a multiprocessor
    registers: int  # 32-bit registers of a multiprocessor
    threads: int  # resident threads of a multiprocessor
    programs: int  # resident programs of a multiprocessor


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912, 167936, 65536, 2048, 32),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448, 233472, 65536, 2048, 32),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448, 233472, 65536, 2048, 32),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, 65536, 4 * 512 * 64, 2048, 32),
    "gfx1100": Chip(GPUTarget("hip", "gfx1100", 32), 65536, 131072, 2 * 2 * 1536 * 32, 2048, 32),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
_MATRIX = {"tcgen05.mma": "UTCMMA", "wgmma.mma_async": "HGMMA", "mma.sync": "HMMA", "v_mfma": "MFMA", "v_wmma": "WMMA"}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one chip."""

    registers: int  # a thread
    spills: int  # registers (AMD) or bytes of stack (NVIDIA) that did not fit; 0 is right
    shared: int  # bytes a program
    occupancy: float  # resident threads over what the chip holds, an upper bound from registers and shared memory
    matrix: str  # the matrix instruction, "" for none
    loads: dict[int, int]  # width in bits of the global loads: how many stand in the code
    fits: bool  # shared memory is within what a program may use

    @property
    def load_bits(self) -> int:
        """Width of the widest global load."""
        return max(self.loads, default=0)

    @property
    def wide_share(self) -> float:
        """Share of the loaded bytes, as they stand in the code, that comes in 128-bit loads."""
        total = sum(bits * count for bits, count in self.loads.items())
        return 128 * self.loads.get(128, 0) / total if total else 0.0


def compile_launch(launch: Launch, family: str) -> Compiled:
    """Compile the kernel of a recorded launch for a chip family in `CHIPS`.

    Raises RuntimeError in an interpreting process, and what the compiler raises.
    """
    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise RuntimeError("this process interprets kernels (TRITON_INTERPRET=1): compile in another one")
    chip = CHIPS[family]
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    kernel = triton.compile(_source(launch), target=chip.target, options=options)
    read = _read_nvidia if chip.target.backend == "cuda" else _read_amd
    registers, spills, assembly, loads = read(kernel)
    shared, threads = int(kernel.metadata.shared), launch.config.warps * chip.target.warp_size
    matrix = next((name for sign, name in _MATRIX.items() if sign in assembly), "")
    occupancy = _occupancy(chip, registers, shared, threads)
    return Compiled(registers, spills, shared, occupancy, matrix, loads, shared <= chip.shared)


def signature(launch: Launch) -> tuple[Any, ...]:
    """What the compiler sees of a launch: launches with equal signatures compile to the same code."""
    source = _source(launch)
    constants = tuple(sorted((k, str(v)) for k, v in source.constants.items()))
    return launch.name, tuple(source.signature.items()), constants, tuple(sorted(source.attrs)), launch.config


def _source(launch: Launch) -> ASTSource:
    """The kernel specialised as the launcher would: integers of 1 are constants, multiples of 16 are known to be so."""
    names = launch.kernel.arg_names
    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for index, name in enumerate(names):
        value = launch.arguments[name]
        if name in constant or (type(value) is int and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        aligned = value.data_ptr() % 16 == 0 if isinstance(value, Tensor) else type(value) is int and value % 16 == 0
        types[name] = (
            f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32" if type(value) is int else "fp32"
        )
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, types, constants, attributes)


def _read_nvidia(kernel: Any) -> tuple[int, int, str, dict[int, int]]:
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads: Counter[int] = Counter()
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", ptx):
        loads[8 * int(size, 0)] += 1
    for vector, bits in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        loads[int(vector or 1) * int(bits)] += 1
    return number["REG"], number["STACK"] + number["LOCAL"], ptx, dict(loads)


_AMD_BITS = {"ubyte": 8, "u8": 8, "sbyte": 8, "ushort": 16, "short": 16, "u16": 16, "d16": 16, "dword": 32, "b32": 32}
_AMD_BITS |= {"dwordx2": 64, "b64": 64, "dwordx3": 96, "b96": 96, "dwordx4": 128, "b128": 128}


def _read_amd(kernel: Any) -> tuple[int, int, str, dict[int, int]]:
    text = kernel.asm["amdgcn"]
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", text)}
    loads: Counter[int] = Counter()
    for width in re.findall(r"\b(?:global|buffer)_load_(?:lds_)?(\w+)", text):
        size = next((s for s in reversed(width.split("_")) if s in _AMD_BITS), None)
        loads[_AMD_BITS.get(size or width, 32)] += 1
    return number["vgpr_count"], number["vgpr_spill_count"], text, dict(loads)


def _occupancy(chip: Chip, registers: int, shared: int, threads: int) -> float:
    """Resident threads over the chip's, from registers (allocated by eights) and shared memory."""
    by_registers = chip.registers // (max(8, -(-registers // 8) * 8) * threads)
    by_shared = chip.shared_total // (shared + 1024) if shared else chip.programs
    programs = min(by_registers, by_shared, chip.programs, chip.threads // threads)
    return programs * threads / chip.threads
