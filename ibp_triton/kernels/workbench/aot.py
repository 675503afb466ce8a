"""Ahead-of-time compilation: what the compiler makes of a launch, for a chip that need not be there.

A recorded launch holds its kernel, its arguments and its tile; from these alone the kernel is compiled as the launch
would have compiled it, and the result is read: registers and spills from the machine code, matrix instructions and
load widths from the assembly. These are static facts, not measurements.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ibp_triton.kernels.launcher import Launch


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
# chips served by the tiles of another family
GUESTS = {
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 101376, 102400, 65536, 1536, 24),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 101376, 102400, 65536, 1536, 24),
    "gfx90a": replace(CHIPS["gfx942"], target=GPUTarget("hip", "gfx90a", 64)),
    "gfx950": replace(CHIPS["gfx942"], target=GPUTarget("hip", "gfx950", 64)),
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
    by_pointer: dict[str, dict[int, int]]  # the same through each pointer argument, in the LLVM code
    fits: bool  # shared memory is within what a program may use

    @property
    def load_bits(self) -> int:
        """Width of the widest global load."""
        return max(self.loads, default=0)


def chip_named(name: str) -> Chip:
    """A chip of `CHIPS` or `GUESTS`; raises ValueError for another name."""
    known = CHIPS | GUESTS
    if name not in known:
        raise ValueError(f"unknown chip {name!r}; choose from {', '.join(known)}")
    return known[name]


def compile_launch(launch: Launch, name: str) -> Compiled:
    """Compile the kernel of a recorded launch for a chip of `CHIPS` or `GUESTS`, and read what came of it.

    Raises RuntimeError in an interpreting process, and what the compiler raises.
    """
    return described(compiled_kernel(launch, name), launch, name)


def compiled_kernel(launch: Launch, name: str) -> Any:
    """The kernel of a recorded launch as Triton's compiler gives it; raises as `compile_launch` does."""
    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise RuntimeError("this process interprets kernels (TRITON_INTERPRET=1): compile in another one")
    return triton.compile(_source(launch), target=chip_named(name).target, options=launch.config.options)


def described(kernel: Any, launch: Launch, name: str) -> Compiled:
    """What is in a compiled kernel of a launch."""
    chip = chip_named(name)
    read = _read_nvidia if chip.target.backend == "cuda" else _read_amd
    registers, spills, assembly, loads = read(kernel)
    shared, threads = int(kernel.metadata.shared), launch.config.warps * chip.target.warp_size
    matrix = next((unit for sign, unit in _MATRIX.items() if sign in assembly), "")
    occupancy = _occupancy(chip, registers, shared, threads)
    names = [name for name, kind in _source(launch).signature.items() if kind != "constexpr"]
    by_pointer = _loads_by_pointer(kernel.asm["llir"], names)
    return Compiled(registers, spills, shared, occupancy, matrix, loads, by_pointer, shared <= chip.shared)


def wide_operands(launch: Launch) -> dict[str, bool]:
    """The operands of a `contract` or `wgrad`, and whether alignment allows 128-bit loads of each.

    It does where the tensor, every run of contiguous elements that the kernel walks along and every step between two
    runs are multiples of 16 bytes. A run is the channels of an image, or the weight's axis of stride 1, with the taps
    where they follow without a gap. The bias is no operand of the product: one vector a program.
    """
    a = launch.arguments
    channels, columns, geometry = a["C"], a["J"], a["GEOMETRY"]
    image = [channels if a["x_c"] == 1 else 1, a["x_n"], a["x_h"], a["x_w"]]
    runs: dict[str, list[int]] = {}
    if launch.name == "wgrad":
        for i in range(a["SEGMENTS"]):
            runs |= {f"x{i}": image, f"d{i}": [columns]}
            if a["AXPY"] >> i & 1:
                runs[f"y{i}"] = image
    else:
        along, across, by_row, by_tap = (a[name] for name in ("w_c", "w_j", "w_h", "w_w"))
        height, width = geometry[4:6]
        dense = (by_tap == channels or width == 1) and (by_row == channels * width or height == 1)
        if across == 1:
            weight = [columns, along, by_row, by_tap]
        elif dense and 1 in (along, channels):
            weight = [channels * height * width, across]
        else:
            weight = [channels if along == 1 else 1, across, by_row, by_tap]
        runs = {"x": [*image, a["x_r"] * a["UNIT"], a["x_t"] * a["UNIT"]], "w": [*weight, a["w_r"]]}
        if a["MASK"]:
            runs["mask"] = [columns]
    return {
        name: a[name].data_ptr() % 16 == 0 and all(n * a[name].element_size() % 16 == 0 for n in lengths)
        for name, lengths in runs.items()
    }


def signature(launch: Launch) -> tuple[Any, ...]:
    """What the compiler sees of a launch: launches with equal signatures compile to the same code."""
    source = _source(launch)
    constants = tuple(sorted((k, str(v)) for k, v in source.constants.items()))
    return launch.name, tuple(source.signature.items()), constants, tuple(sorted(source.attrs)), launch.config


def _source(launch: Launch) -> ASTSource:
    """The kernel specialised as the launcher would: integers of 1 are constants, multiples of 16 are known to be so.

    Unless the kernel does without, for an argument that changes from batch to batch.
    """
    names = launch.kernel.arg_names
    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    general = {p.name for p in launch.kernel.params if p.do_not_specialize}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for index, name in enumerate(names):
        value = launch.arguments[name]
        if name in constant or (type(value) is int and value == 1 and name not in general):
            types[name], constants[name] = "constexpr", value
            continue
        aligned = value.data_ptr() % 16 == 0 if isinstance(value, Tensor) else type(value) is int and value % 16 == 0
        aligned = aligned and name not in general
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
    return number["REG"], number["STACK"] + number["LOCAL"], ptx, dict(Counter(_ptx_loads(ptx)))


def _ptx_loads(ptx: str) -> list[int]:
    """Bits of each global load in the text."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", ptx)
    plain = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return [8 * int(size, 0) for size in copies] + [int(vector or 1) * int(bits) for vector, bits in plain]


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


_POINTER = re.compile(r"ptr addrspace\(1\) (?:nonnull )?(%[\w.]+)")
_LLVM_LOAD = re.compile(r" = load (?:volatile )?(?:<(\d+) x )?(?:[if]?(\d+)|(\w+))>?, ptr addrspace\(1\)")
_BUFFER_LOAD = re.compile(  # AMD's, where offsets are known to be small
    r" = (?:tail )?call (?:<(\d+) x )?(?:i?(\d+)|(\w+))>? "
    r"@llvm\.amdgcn\.raw\.ptr\.buffer\.load\S*\(ptr addrspace\(8\) (%[\w.]+)"
)
_LLVM_BITS = {"float": 32, "bfloat": 16, "half": 16}


def _loads_by_pointer(llir: str, arguments: list[str]) -> dict[str, dict[int, int]]:
    """Widths of the global loads through each argument, from the LLVM code, the last to know the arguments.

    Raises RuntimeError for a load whose address is no argument's.
    """
    sources: dict[str, list[str]] = {}  # the pointers that a pointer is made of
    loads: list[tuple[str, int]] = []
    for line in llir.splitlines():
        made = re.match(r"\s+(%[\w.]+) = (getelementptr|phi ptr|select|freeze|(?:tail )?call ptr)\b", line)
        pointers = _POINTER.findall(line)
        if made:
            phi = re.findall(r"\[ (%[\w.]+), %", line) if made[2] == "phi ptr" else []
            sources[made[1]] = pointers + phi
        elif widths := _ptx_loads(line):
            loads += [(pointers[-1], bits) for bits in widths]
        elif load := _BUFFER_LOAD.search(line):
            loads.append((load[4], int(load[1] or 1) * (int(load[2] or 0) or _LLVM_BITS[load[3]])))
        elif load := _LLVM_LOAD.search(line):
            loads.append((pointers[0], int(load[1] or 1) * (int(load[2] or 0) or _LLVM_BITS[load[3]])))
    found: dict[str, Counter[int]] = {}
    for pointer, bits in loads:
        found.setdefault(_argument(pointer, sources, arguments), Counter())[bits] += 1
    return {name: dict(widths) for name, widths in found.items()}


def _argument(pointer: str, sources: dict[str, list[str]], arguments: list[str]) -> str:
    seen, open_ends = {pointer}, [pointer]
    while open_ends:
        name = open_ends.pop()
        if name not in sources and name.removeprefix("%").isdigit() and int(name[1:]) < len(arguments):
            return arguments[int(name[1:])]
        fresh = [source for source in sources.get(name, ()) if source not in seen]
        seen.update(fresh)
        open_ends += fresh
    raise RuntimeError(f"the load through {pointer} leads to no argument")


def _occupancy(chip: Chip, registers: int, shared: int, threads: int) -> float:
    """Resident threads over the chip's, from registers (allocated by eights) and shared memory."""
    by_registers = chip.registers // (max(8, -(-registers // 8) * 8) * threads)
    by_shared = chip.shared_total // (shared + 1024) if shared else chip.programs
    programs = min(by_registers, by_shared, chip.programs, chip.threads // threads)
    return programs * threads / chip.threads
