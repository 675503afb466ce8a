"""Recording what runs: the model's own forward on the real batch, each torch function becoming a node as it is called.

The model runs as in training, with grad mode on, under a ``TorchFunctionMode``. A function that takes an activation or
a parameter is evaluated by its rule with grad mode off; the model gets the result as a tensor that requires a gradient
but has no history. What runs where grad mode is off, or takes neither, runs as it is, and its result is a constant. A
result of unseen code (a custom autograd.Function) shows by its history and becomes a node of autograd's own.

The last recording is followed as long as the calls are the same ones: its nodes are used again, never its values. So
nothing that the model does is frozen, and an unchanged model costs no analysis.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ibp_triton.backends.torch.generic import Generic
from ibp_triton.backends.torch.outputs import Part
from ibp_triton.backends.torch.sync_batch_norm import sync_batch_norm
from ibp_triton.backends.torch.unseen import Hooked, Leaf
from ibp_triton.backends.torch.written import Written, geometry, seen
from ibp_triton.checks import refuse_mixed
from ibp_triton.errors import ModelError
from ibp_triton.graph import Constant, Graph, Node, Ref
from ibp_triton.layer import Layer, Uncovered
from ibp_triton.recording import calls
from ibp_triton.recording.arguments import bind, bind_named, rebuilt, unbind
from ibp_triton.recording.call import Call
from ibp_triton.recording.calls import Kind
from ibp_triton.recording.choice import choose, has_rule
from ibp_triton.recording.history import History
from ibp_triton.recording.memory import Memory, Write, level, storage_of, tensors_in, wrapped
from ibp_triton.recording.running import Running
from ibp_triton.recording.settings import Diverged, Restart, Settings
from ibp_triton.recording.transcript import Transcript

_CONSTANT = Constant()
_REFS = [Ref(i) for i in range(256)]  # most keys, made once, compare by identity
_STATISTICS = {
    F.batch_norm,
    F.instance_norm,
    torch.batch_norm,
    torch.instance_norm,
    sync_batch_norm,
}  # in a dtype of their own


class Recorder(TorchFunctionMode):
    """One recording: afterwards ``transcript`` has the nodes and what they computed."""

    def __init__(
        self, settings: Settings, last: Graph | None, opaque: weakref.WeakSet[nn.Module], strict: bool = False
    ) -> None:
        super().__init__()
        self.settings, self.opaque, self.strict = settings, opaque, strict
        self.own = settings.own
        self._apart = bool(opaque)  # whether some modules run by plain autograd
        self.transcript = so_far = Transcript(last, settings.keep, strict)
        self.nodes, self.values, self.layers = so_far.nodes, so_far.values, so_far.layers
        self.memory = Memory(self.layers, self.values)
        self._names = {id(p): name for name, p in self.own.items()}
        self._history = History(self.own.values())
        self._running = Running(settings.model)
        self._level = level()
        for buffer in settings.model.buffers() if self._level is not None else ():  # those that vmap has put there
            self.memory.track(buffer, None)
        self._call = Call()
        self._casting = False
        floats = settings.model.buffers() if settings.dtype is not None else ()
        self._buffers = {id(b): b for b in floats if b.is_floating_point()}
        self._casts: dict[int, Tensor] = {}

    # ---------------------------------------------------------------------------------------------------- a call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = calls.KINDS.get(func)
        if kind is Kind.READ:
            if self.settings.watch:
                self._look(args)
            return func(*args, **kwargs)
        if level() != self._level or (self._apart and self._running.inside(self.opaque)):
            return func(*args, **kwargs)
        if kind is not None:
            return self._no_layer(kind, func, args, kwargs)
        how, target = calls.written(func, args, kwargs)
        if not torch.is_grad_enabled():
            return self._plain(func, args, kwargs, target)
        if func in calls.APART:
            with self:
                return calls.APART[func](*args, **kwargs)
        if func in calls.SHAPED_LIKE:
            args = (args[0], *map(_constant, args[1:]))
            kwargs = {name: _constant(value) for name, value in kwargs.items()}
        call = self._call = Call()
        self._casting = self.settings.dtype is not None and func not in _STATISTICS
        call.values, call.keys = bind(args, self._tensor)
        if kwargs:
            call.named, call.named_keys = bind_named(kwargs, self._tensor)
        if not call.operands:
            return self._plain(func, args, kwargs, target)
        if torch._C._is_any_autocast_enabled():
            return self._without_autocast(func, types, args, kwargs)
        if how is not None and target is not None:
            return self._write(func, how, target, args, kwargs)
        return self._evaluate(func, call)[0]

    def _without_autocast(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A network with a dtype of its own computes in that one, whatever its model, or a wrapper of it, asks for."""
        if self.settings.dtype is None:
            refuse_mixed()
        with ExitStack() as off:
            for device in {a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)} | {"cpu"}:
                off.enter_context(torch.autocast(device, enabled=False))
            return self.__torch_function__(func, types, args, kwargs)

    def _no_layer(self, kind: Kind, func: Any, args: Any, kwargs: Any) -> Any:
        if kind is Kind.CONSTANT:
            return self._plain(func, args, kwargs, None)
        if kind is Kind.NUMBER:  # of an activation as of a tensor without gradient
            if self.settings.watch:
                self._look(args)
            plain = [a.detach() if isinstance(a, Tensor) and a.requires_grad else self._replaced(a) for a in args]
            return func(*plain, **kwargs)
        if kind is Kind.HOOK and any(isinstance(a, Tensor) and self._index(a) is not None for a in args):
            raise ModelError(
                f"Tensor.{func.__name__} on an activation inside forward would never fire: the sweeps build no "
                "autograd graph (bp, at, fast_at, pgd_training and trades do). Use a full backward hook of the module, "
                "or take that gradient elsewhere"
            )
        module = self._running.module() or self.settings.model
        if kind is Kind.GRAPH and module not in self.opaque:
            raise Restart(module)
        return func(*args, **kwargs)

    def _plain(self, func: Any, args: Any, kwargs: Any, target: Any) -> Any:
        """The call as it is: its result is a constant."""
        if isinstance(target, Tensor):
            self.memory.set_apart(target)
        if self.settings.watch:
            self._look(args)
        if self.settings.parameters:
            args = [self._replaced(a) if a is not target else a for a in args]
        result = func(*args, **kwargs)
        if func is Tensor.detach_:
            self.memory.track(result, None)
        known = [a for a in args if isinstance(a, Tensor) and self.memory.knows(a)]
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(part, Tensor) or self.memory.knows(part):
                continue
            if self._level is not None or self.memory.shares(part, known):
                self.memory.track(part, None)
        return result

    def _look(self, args: Any) -> None:
        """The model sees these tensors otherwise than through layers: a lowering must leave them what they are."""
        for a in args:
            index = self.memory.node(a) if isinstance(a, Tensor) else None
            if index is None:
                continue
            if self.strict and not self.nodes[index].observed:
                raise Diverged
            self.nodes[index].observed = True

    def _replaced(self, a: Any) -> Any:
        name = self._names.get(id(a)) if isinstance(a, nn.Parameter) else None
        return a if name is None else self.settings.parameters.get(name, a)

    # --------------------------------------------------------------------------------------------- arguments

    def _tensor(self, a: Tensor) -> tuple[Tensor, Any]:
        """What a layer gets for a tensor, and the key."""
        if self.memory.writes:
            self._catch_up(a)
        call, name = self._call, self._names.get(id(a))
        if name is not None:
            index: int | None = self._parameter(name)
        elif (index := self.memory.node(a)) is None and (index := self._index(a)) is None:
            call.constants.append(a)
            call.generic = call.generic or a.is_complex()
            return (self._cast(a) if self._casting and id(a) in self._buffers else a), _CONSTANT
        assert index is not None
        call.operands.append(index)
        if self.transcript.complex:
            call.generic = call.generic or index in self.transcript.complex
        value = a.detach() if name is None else self.values[index]
        call.sources.append((value, a))
        return value, _REFS[index] if index < len(_REFS) else Ref(index)

    def _index(self, a: Tensor) -> int | None:
        """The node of a tensor, None for a constant."""
        index = self.memory.node(a)
        if index is not None:
            return index
        name = self._names.get(id(a))
        if name is not None:
            return self._parameter(name)
        if a.requires_grad and a.grad_fn is not None:
            return self._leaf(a)
        if self._level is not None and wrapped(a) and not self.memory.knows(a):
            raise ModelError(
                f"{self._running}: under torch.func transforms a tensor came from code that torch shows nothing of (a "
                "scripted or compiled part); run gradients() without vmap for this model"
            )
        return None

    def _cast(self, a: Tensor) -> Tensor:
        if id(a) not in self._casts:
            self._casts[id(a)] = a.detach().to(self.settings.dtype)
        return self._casts[id(a)]

    # ------------------------------------------------------------------------------------------------- nodes

    def input(self, x: Tensor) -> Tensor:
        """The node of x; what the model gets for it."""
        node = self.transcript.followed("x") or Node(0, "", "active", call="x")
        value = self._in_dtype(x.detach())
        self.transcript.append(node, value, None)
        return self._publish(value, 0)  # type: ignore[no-any-return]

    def _parameter(self, name: str) -> int:
        """The node of a parameter, one for all its uses."""
        position = self.transcript.parameters.get(name)
        if position is None:
            call, position = ("parameter", name), len(self.nodes)
            node = self.transcript.followed(call) or Node(position, name, "parametric", call=call)
            value = self.settings.parameters.get(name, self.own[name])
            self.transcript.append(node, self._in_dtype(value.detach()), None)
            self.transcript.parameters[name] = position
        return position

    def _in_dtype(self, value: Tensor) -> Tensor:
        dtype = self.settings.dtype
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    def _evaluate(self, func: Any, call: Call) -> tuple[Any, int | None]:
        """The call by its rule: what the model gets, and its node (None for a constant or an argument given back)."""
        following, key = self.transcript.following, (func, call.keys, call.named_keys, call.generic)
        node = self.transcript.followed(key, passing=True) or self._made(func, key, call)
        stray = self.strict and not self.transcript.following
        layer = node.rule(node)  # type: ignore[misc]
        if node.sloped_by is not None:
            layer.sloped_by = self.layers[node.sloped_by]
        for a in call.constants:
            self.memory.meet(a)
        torch._C._set_grad_enabled(False)
        try:
            try:
                out = layer.forward(*call.values, **call.named)
                covered = call.generic or not isinstance(out, Tensor) or not out.is_complex()  # rules are of real ones
            except Uncovered:
                covered = False
            if not covered:
                call.generic = True
                node = self._made(func, key, call)
                layer = Generic(node)
                out = layer.forward(*call.values, **call.named)
        finally:
            torch._C._set_grad_enabled(True)
        if not self.strict or stray:  # a lowering may let a layer pass its input on
            generic = type(layer) is Generic
            for value, a in call.sources:
                if out is value or (generic and _returned(layer, value)):
                    self.transcript.following = following
                    self.transcript.passed.append(key)
                    return a, self._index(a)
            if stray:
                raise Diverged
            if generic and not layer.differentiable:  # type: ignore[union-attr]
                self.transcript.following = following
                return out, None
        index = len(self.nodes)
        if layer.shapes_only:
            layer.let_go_of_numbers()
        self.transcript.append(node, out, layer)
        return self._publish(out, index), index

    def _made(self, func: Any, key: Any, call: Call) -> Node:
        """A new node: its rule, and the names of its operands."""
        args, kwargs = tuple(map(unbind, call.keys)), {name: unbind(key) for name, key in call.named_keys}
        node = Node(
            len(self.nodes), self._running.path(), self.transcript.kind(call.operands), func, args, kwargs, call=key
        )
        choose(node, self.nodes, generic=call.generic)
        return node

    def _publish(self, out: Any, index: int) -> Any:
        """What the model gets for a node's value: tensors that require a gradient and have no history."""
        if isinstance(out, Tensor):
            if not (out.is_floating_point() or out.is_complex()):
                self.memory.meet(out)
                return out
            shown = out.detach()
            if self._level is None:
                shown.requires_grad_()
            self.memory.track(shown, index)
            return shown
        if isinstance(out, (tuple, list)):
            for a in tensors_in(out):
                self.memory.meet(a)
            return rebuilt(out, [self._part(part, i, index) for i, part in enumerate(out)])
        return out

    def _part(self, part: Any, position: int, of: int) -> Any:
        if not isinstance(part, Tensor) or not (part.is_floating_point() or part.is_complex()):
            return part
        call, place = ("part", of, position), len(self.nodes)
        node = self.transcript.followed(call)
        if node is None:
            whole = self.nodes[of]
            node = Node(place, whole.where, whole.kind, Part, rule=Part, operands={"input": of}, call=call)
        layer = Part(node)
        self.transcript.append(node, layer.forward(part, position), layer)
        return self._publish(part, place)

    # ---------------------------------------------------------------------------------------- unseen code

    def _leaf(self, a: Tensor) -> int | None:
        """The node of a tensor that unseen code made: autograd's graph behind it says of what."""
        last: Any = a.grad_fn
        if last.name() == "CheckpointFunctionBackward":
            return self._checkpointed(a, last)
        hooked = last.name() == "BackwardHookFunctionBackward"
        found: dict[int, Tensor] = {}
        for variable, number in self._history.ends(
            last, [last.next_functions[a.output_nr]] if hooked else last.next_functions
        ):
            index = self._index_then(variable, number)
            if index is not None:
                found.setdefault(index, variable)
        if not found:
            self.memory.track(a, None)
            return None
        call, place = ("autograd", last.name(), tuple(found)), len(self.nodes)
        node = self.transcript.followed(call)
        if node is None:
            rule, function = Hooked if hooked else Leaf, _Named(last.name().removesuffix("Backward"))
            operands = {str(k): i for k, i in enumerate(found)}
            node = Node(
                place,
                self._running.path(),
                self.transcript.kind(found),
                function,
                rule=rule,
                operands=operands,
                call=call,
            )
        layer = node.rule(node)  # type: ignore[misc]
        self.transcript.append(node, layer.forward(a, *found.values()), layer)
        self._history.add(a)
        self.memory.track(a, place)
        return place

    def _index_then(self, a: Tensor, number: int) -> int | None:
        """The node that a tensor was when the function of this sequence number took it."""
        name = self._names.get(id(a))
        if name is None:
            return self.memory.node_then(a, number)
        if self.settings.parameters or self.settings.dtype is not None:
            raise ModelError(
                f"{self._running}: a custom autograd.Function takes the parameter '{name}' itself, not the value that "
                "is to replace it; leave dtype= and parameters= out for this model"
            )
        return self._parameter(name)

    def _checkpointed(self, a: Tensor, last: Any) -> int | None:
        """A reentrant checkpoint hides its parameters: what it ran is run again, recorded, on the same numbers."""
        inputs = list(last.inputs)
        for position, tensor in zip(last.tensor_indices, last.saved_tensors, strict=True):
            inputs[position] = tensor
        before, call, casting = torch.get_rng_state(), self._call, self._casting
        if getattr(last, "preserve_rng_state", False):
            torch.set_rng_state(last.fwd_cpu_state)
        with self:
            outputs = last.run_function(*inputs)
        torch.set_rng_state(before)
        self._call, self._casting = call, casting
        index = self._index(outputs[a.output_nr] if isinstance(outputs, (tuple, list)) else outputs)
        self.memory.track(a, index)
        return index

    # ------------------------------------------------------------------------------------------------ writes

    def _write(self, func: Any, how: calls.InPlace, target: Tensor, args: Any, kwargs: Any) -> Any:
        """An in-place call as the node of its pure form, whose value then takes the target's place."""
        call, memory = self._call, self.memory
        if func in calls.REFUSED:
            raise ModelError(f"{self._running}: {func.__name__} on an activation can't be followed; make a new tensor")
        if id(target) in self._names:
            return func(*args, **kwargs)  # torch refuses this for a parameter that requires a gradient
        if not self.settings.own_input and storage_of(target) is storage_of(self.values[0]):
            raise Restart
        count, following = len(self.nodes), self.transcript.following
        pure = how.pure if how.pure is func or how.reshapes or has_rule(how.pure) else calls.Cloned(func)
        found, index = self._evaluate(pure, call.without(calls.flag_position(func)) if pure is func else call)
        if not how.reshapes and (found.shape != target.shape or found.dtype != target.dtype):
            self.transcript.take_back(count, following)
            found, index = self._evaluate(calls.Cloned(func), call)
        memory.remember(target)
        with torch.no_grad():
            if how.reshapes:
                func(*args, **kwargs)
                memory.track(target, index)
                return target
            if wrapped(target) and len(memory.aliases(storage_of(target))) > 1:
                raise ModelError(
                    f"{self._running}: under torch.func transforms an in-place operation on a view, or on a tensor "
                    "with views, can't be followed; write it without the trailing underscore"
                )
            memory.deposit(target, found.detach(), index)
        self._requires_grad(target)
        return target

    def _requires_grad(self, a: Tensor) -> None:
        """Unseen code shall see that the tensor carries a derivative now; a model's buffer stays as it is."""
        if self._level is None and not a.requires_grad and all(a is not b for b in self.settings.model.buffers()):
            a.requires_grad_()

    def _catch_up(self, a: Tensor) -> None:
        """A tensor whose memory was written to through another: its node is what it now shows."""
        if id(a) in self._names:
            return
        for write in self.memory.news(a):
            self._show(a, write)
        self.memory.up_to_date(a)

    def _show(self, a: Tensor, write: Write) -> None:
        old, here, place = self.memory.node(a), geometry(a), len(self.nodes)
        operands = {name: i for name, i in (("old", old), ("new", write.node)) if i is not None}
        positions = seen(here, write.place)
        if not operands or (positions < 0).all():
            return
        call = ("write", here, write.place, tuple(operands.items()))
        node = self.transcript.followed(call)
        if node is None:
            kind = self.transcript.kind(operands.values())
            node = Node(place, self._running.path(), kind, Written, rule=Written, operands=operands, call=call)
        layer = Written(node)
        now = layer.forward(a.detach(), torch.from_numpy(positions).to(a.device), write.place[0])
        self.transcript.append(node, now, layer)
        self._requires_grad(a)
        self.memory.remember(a)
        self.memory.track(a, place)

    # ------------------------------------------------------------------------------------------------ the end

    def output(self, logits: Tensor) -> int:
        """The node of what the model returned."""
        if self.memory.writes:
            self._catch_up(logits)
        index = self._index(logits)
        if index is None:
            raise ModelError(
                "the model's output depends neither on x nor on a parameter: it was detached, or computed under "
                "torch.no_grad or torch.inference_mode, or from integers"
            )
        self.values[index] = logits.detach()
        if self.settings.watch:  # whoever holds a tensor still, as a hook or a module does, will look at it
            self._call = Call()
            self._look([a for a in self.memory.alive() if a is not logits])
        return index


@dataclass(frozen=True)
class _Named:
    """Stands for a function that was not seen."""

    __name__: str


def _constant(a: Any) -> Any:
    """A tensor without its derivatives; anything else as it is."""
    return a.detach() if isinstance(a, Tensor) else a


def _returned(layer: Layer, value: Tensor) -> bool:
    """Whether a function evaluated by the generic rule gave this argument back."""
    if not isinstance(layer, Generic) or layer.wrapped:
        return False
    pairs = zip(layer.inputs, layer.sources, strict=True)
    return any(a is value and source is layer.graphed for a, source in pairs)
