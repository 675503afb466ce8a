"""An instrumented Triton interpreter: what a kernel does to memory, seen on a machine without a GPU.

The stock interpreter runs a kernel in numpy and forgives what a GPU does not. Inside `observe()` every access of every
launch is checked and counted:

* an access outside the *view* that a pointer argument was given is a `Fault`, also when it stays inside the storage;
* so is an element written by one program and read or written by another one of the same launch (no order between
  programs is promised), and two lanes of one store that write different values to one address;
* masked-off lanes of a load without `other` are filled with NaN or a large integer, as a GPU may leave anything there;
* bytes, unique bytes (each address once per launch) and dot-product FLOPs are counted per pointer.

`repair()` mends the arithmetic, for good: bf16 is computed as bf16 (the stock interpreter multiplies the bits as
integers) and float32 operands of a tf32 product lose the 13 bits that the tensor core drops; and what the interpreter
does for nothing is left out. It sees neither shared-memory races nor anything else below Triton's own language.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Builder: Any = interpreter.InterpreterBuilder
Handle: Any = interpreter.TensorHandle
Array = np.ndarray[Any, Any]
NOBODY, SEVERAL = -1, -2  # in a shadow: no program, or more than one


class Fault(Exception):  # noqa: N818 - what a memory checker finds is a fault
    """A kernel touched memory that it must not touch, or in an order that no GPU promises."""


@dataclasses.dataclass
class Traffic:
    """What one launch did to the memory behind one pointer argument."""

    loaded: int = 0  # bytes, each lane that is not masked off
    stored: int = 0
    unique_loaded: int = 0  # bytes, each address once
    unique_stored: int = 0


@dataclasses.dataclass
class Observation:
    """Counts of one launch."""

    kernel: str
    traffic: dict[str, Traffic]
    flops: int = 0  # multiplications and additions inside tl.dot, padding included
    programs: int = 0

    def total(self, field: str) -> int:
        """Sum of one field of `Traffic` over the pointer arguments."""
        return sum(getattr(traffic, field) for traffic in self.traffic.values())


class View:
    """The bytes that one pointer argument may touch, with a shadow of who touched each element."""

    def __init__(self, name: str, tensor: Any) -> None:
        self.names = [name]
        self.itemsize = tensor.element_size()
        self.low = tensor.data_ptr()
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.count = reach if tensor.numel() else 0
        self.high = self.low + self.count * self.itemsize
        self.writer = np.full(self.count, NOBODY, np.int32)
        self.reader = np.full(self.count, NOBODY, np.int32)
        self.traffic = Traffic()

    def _same_bytes(self, other: "View") -> bool:
        return (self.low, self.high, self.itemsize) == (other.low, other.high, other.itemsize)

    def check_load(self, index: Array, program: int) -> str | None:
        """Note the readers of these elements; say what is wrong with it, if anything."""
        foreign = (self.writer[index] != NOBODY) & (self.writer[index] != program)
        seen = self.reader[index]
        self.reader[index] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)
        return f"{foreign.sum()} elements were written by another program" if foreign.any() else None

    def check_store(self, index: Array, program: int, values: Array) -> str | None:
        """Note the writer of these elements; say what is wrong with it, if anything."""
        foreign = np.zeros(index.shape, bool)
        for shadow in (self.writer[index], self.reader[index]):
            foreign |= (shadow != NOBODY) & (shadow != program)
        self.writer[index] = program
        if foreign.any():
            return f"{foreign.sum()} elements are also touched by another program"
        order = np.argsort(index, kind="stable")
        twice = np.diff(index[order]) == 0
        if bool((twice & (values[order][1:] != values[order][:-1])).any()):
            return "lanes of one store write different values to one address"
        return None

    def settle(self) -> Traffic:
        """The counts, with the unique bytes filled in."""
        self.traffic.unique_loaded = int((self.reader != NOBODY).sum()) * self.itemsize
        self.traffic.unique_stored = int((self.writer != NOBODY).sum()) * self.itemsize
        return self.traffic


class ObservedLaunch:
    """The views and counts of the launch that is running."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.views: list[View] = []
        for name, value in arguments.items():
            if hasattr(value, "data_ptr"):
                self._add(View(name, value))
        self.observation = Observation(kernel, {})

    def _add(self, view: View) -> None:
        for known in self.views:
            if known._same_bytes(view):  # two arguments, one tensor: they share a shadow
                known.names += view.names
                return
        self.views.append(view)

    def access(self, kind: str, pointers: Array, mask: Array, itemsize: int, values: Array | None = None) -> None:
        """Check and count one load or store; raises `Fault`."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        touched = pointers[mask]
        if touched.size == 0:
            return
        low, high = int(touched.min()), int(touched.max()) + itemsize
        view = next((v for v in self.views if v.low <= low and high <= v.high), None)
        builder = interpreter.interpreter_builder
        place = f"{kind} in {self.observation.kernel}, program {builder.grid_idx}"
        if view is None:
            nearest = min(self.views, key=lambda v: max(v.low - low, high - v.high))  # the least overhang
            bad = (touched < nearest.low) | (touched + np.uint64(itemsize) > nearest.high)
            raise Fault(f"out of bounds: {place}: {bad.sum()} of {touched.size} lanes outside `{nearest.names[0]}`")
        if view.itemsize != itemsize:
            raise Fault(f"{place}: {itemsize}-byte access to `{view.names[0]}` of {view.itemsize}-byte elements")
        x, y, z = builder.grid_idx
        program = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        index = ((touched - np.uint64(view.low)) // np.uint64(itemsize)).astype(np.int64)
        if kind == "load":
            view.traffic.loaded += touched.size * itemsize
            trouble = view.check_load(index, program)
        else:
            assert values is not None
            view.traffic.stored += touched.size * itemsize
            trouble = view.check_store(index, program, np.broadcast_to(values, pointers.shape)[mask])
        if trouble:
            raise Fault(f"race: {place}, `{view.names[0]}`: {trouble}")

    def settle(self) -> Observation:
        """The counts of the whole launch."""
        self.observation.traffic = {"=".join(v.names): v.settle() for v in self.views}
        self.observation.programs = int(np.prod(interpreter.interpreter_builder.grid_dim))
        return self.observation


_running: list[ObservedLaunch] = []  # the launch under observation, at most one
_observers: list[list[Observation]] = []


@contextmanager
def observe() -> Iterator[list[Observation]]:
    """Check and count every launch in the block; yields the list that receives one `Observation` a launch.

    Raises `Fault`, wrapped in triton's InterpreterError, at the first access that is out of bounds or races, and
    RuntimeError when the interpreter is not on or `repair` was not called.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported: compiled kernels cannot be observed")
    repair()
    seen: list[Observation] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)


# ---------------------------------------------------------------------------------------------------- arithmetic


def _widen(data: Array) -> Array:
    """bf16 bits as float32; anything else unchanged."""
    return (data.astype(np.uint32) << 16).view(np.float32) if data.dtype == np.uint16 else data


def _round_bf16(data: Array) -> Array:
    """float32 to the bits of the nearest bf16, ties to even."""
    data = np.ascontiguousarray(data, np.float32)
    bits = data.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), nearest)


def _truncate_tf32(data: Array) -> Array:
    """float32 with the 13 low bits of the significand dropped."""
    kept: Array = (np.ascontiguousarray(data, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return kept


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _elementwise(stock: Callable[..., Any], position: int) -> Callable[..., Any]:
    """An n-ary operation in which bf16 operands (told by the one at `position`) are widened, the result rounded."""

    @functools.wraps(stock)
    def operation(self: Any, *args: Any) -> Any:
        *operands, op = args
        if op is np.where or not _is_bf16(operands[position]) or operands[position].data.dtype != np.uint16:
            out = stock(self, *args)
            if out.data.dtype == bool:
                out.dtype = tl.int1  # the stock interpreter keeps the operands' type, and a splat then makes integers
            return out
        out = op(*(_widen(operand.data) for operand in operands))
        return Handle(out, tl.int1) if out.dtype == bool else Handle(_round_bf16(out), tl.bfloat16)

    return operation


def _cast(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        scalar = target.scalar
        if _is_bf16(source) and scalar != tl.bfloat16:
            return Handle(_widen(source.data).astype(interpreter._get_np_dtype(scalar)), scalar)
        if scalar == tl.bfloat16 and not _is_bf16(source):
            return Handle(_round_bf16(source.data.astype(np.float32)), scalar)
        return stock(self, source, target, *rounding)

    return cast


def _dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, _: Any) -> Any:
    left, right = _widen(a.data), _widen(b.data)
    if _running:
        _running[0].observation.flops += 2 * int(np.prod(acc.data.shape)) * left.shape[-1]
    if str(precision).upper().endswith("TF32") and left.dtype == np.float32:
        left, right = _truncate_tf32(left), _truncate_tf32(right)
    product = np.matmul(left, right, dtype=np.promote_types(acc.data.dtype, np.float32))
    return Handle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)


# ---------------------------------------------------------------------------------------------------- memory


def _itemsize(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


def _rubbish(pointers: Any) -> Any:
    """What a GPU may leave in a masked-off lane: NaN, or an integer far outside any extent."""
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        value: Any = 0x7FC1
    elif dtype.kind == "f":
        value = np.nan
    else:
        value = True if dtype.kind == "b" else np.iinfo(dtype).max - 7
    return Handle(np.full(pointers.data.shape, value, dtype), element)


def _load(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load(self: Any, pointers: Any, mask: Any, other: Any, *hints: Any) -> Any:
        if _running:
            _running[0].access("load", pointers.data, mask.data, _itemsize(pointers))
            if other is None and not mask.data.all():
                other = _rubbish(pointers)
        return stock(self, pointers, mask, other, *hints)

    return load


def _store(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def store(self: Any, pointers: Any, value: Any, mask: Any, *hints: Any) -> Any:
        if _running:
            _running[0].access("store", pointers.data, mask.data, _itemsize(pointers), value.data)
        return stock(self, pointers, value, mask, *hints)

    return store


def _no_atomics(*_: Any) -> Any:
    raise Fault("atomics make sums depend on the order of arrival; the kernels of this package do without")


def _execute(stock: Callable[..., Any]) -> Callable[..., Any]:
    """GridExecutor.__call__ that opens and closes the observation of a launch."""

    @functools.wraps(stock)
    def execute(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _observers:
            return stock(self, *args, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launch = ObservedLaunch(self.fn.__name__, arguments)
        _running.append(launch)
        try:
            out = stock(self, *args, **kwargs)
        finally:
            _running.clear()
        seen = launch.settle()
        for observer in _observers:
            observer.append(seen)
        return out

    return execute


@functools.cache
def repair() -> None:
    """Patch the interpreter, once per process: right bf16 and tf32 arithmetic, the hooks of `observe`, and haste."""
    Builder.binary_op = _elementwise(Builder.binary_op, 0)
    Builder.ternary_op = _elementwise(Builder.ternary_op, 1)
    Builder.unary_op = _elementwise(Builder.unary_op, 0)
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext"):
        setattr(Builder, name, _cast(Builder.cast_impl))
    Builder.create_fp_trunc = _cast(Builder.cast_impl)
    Builder.create_fp_to_fp = _cast(Builder.create_fp_to_fp)
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.get_bf16 = lambda self, value: Handle(_round_bf16(np.array([value], np.float32)), tl.bfloat16)
    Builder.create_dot = _dot
    Builder.create_masked_load = _load(Builder.create_masked_load)
    Builder.create_masked_store = _store(Builder.create_masked_store)
    Builder.create_atomic_rmw = _no_atomics
    Builder.create_atomic_cas = _no_atomics
    interpreter.GridExecutor.__call__ = _execute(interpreter.GridExecutor.__call__)
    _hasten()


# ---------------------------------------------------------------------------------------------------- haste


def _hasten() -> None:
    """Spare the stock interpreter what it computes for nothing, more than half of its time.

    It works out whether each sum and product of integers overflows, and then asserts that in debug mode alone, which it
    does not have.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter._patch_builtin = _patch_builtin
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)


def _by_name(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The numpy type of a Triton type, looked up in one table, not in one that is made for each operation."""
    known: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = stock(dtype)
        return known[name]

    return get


@functools.cache
def _builtins(package: Any) -> list[str]:
    """Names of the operations of Triton's language in a module or class of it."""
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """The stock function, which reads all of the package at each launch and each call of a kernel's function."""
    for name in _builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # else it is patched
            interpreter._patch_attr(package, name, member, builder, scope)


def _broadcast(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Two operands of one shape, most of them, as they are."""

    @functools.wraps(stock)
    def broadcast(self: Any, left: Any, right: Any) -> Any:
        one, other = left.type, right.type
        if one.is_block() and other.is_block() and list(one.shape) == list(other.shape):
            return left, right
        return stock(self, left, right)

    return broadcast
