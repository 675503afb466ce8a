"""From an nn.Module to a torch.fx graph of torch functions; what cannot be traced stays one opaque module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ibp_triton.randomness import RandomState

OPAQUE = (nn.MultiheadAttention, nn.modules.batchnorm._BatchNorm, nn.RNNBase)  # a layer each, by definition


class Tracer(fx.Tracer):
    """Traces through every module down to torch functions, and remembers which module it failed in."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: set[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.opaque, self.path, self.modes = opaque, [""], _modes()
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules with hooks run whole, so that the hooks run; so do those found untraceable before."""
        return module_qualified_name in self.opaque or isinstance(m, OPAQUE) or hooked(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace a submodule; an exception marks the innermost one."""
        self.path.append(self.path_of_module(m))
        try:
            return self.watched(lambda: super(Tracer, self).call_module(m, forward, args, kwargs))
        finally:
            self.path.pop()

    def watched(self, call: Callable[[], Any]) -> Any:
        """Run ``call``; an exception or a random number drawn for good inside marks the current module as failed."""
        before, path = RandomState.now(), self.path[-1]
        try:
            result = call()
            if before.differs(RandomState.now()):
                raise fx.proxy.TraceError("random numbers drawn outside torch's dropout functions")
            return result
        except Exception:
            before.restore()
            self.failed = path if self.failed is None else self.failed
            raise

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows its module; inside no_grad or autocast a module cannot be traced."""
        if _modes() != self.modes:
            raise fx.proxy.TraceError("torch.no_grad, enable_grad or autocast inside forward")
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = self.path[-1]
        return node


def trace(model: nn.Module, functionalise: Callable[[fx.Graph, nn.Module], Any], warn: bool = True) -> Any:
    """``functionalise(graph, model)`` of the model's graph, retried with one more opaque module after each failure.

    ``functionalise`` may raise ``UntraceableError(path)`` for what shows only in the finished graph.
    None where the whole model is opaque.
    """
    opaque: set[str] = set()
    paths = {path for path, _ in model.named_modules()}
    while not hooked(model):
        try:
            with torch.enable_grad():  # so that a no_grad inside forward shows
                tracer = Tracer(opaque)
                graph = tracer.watched(lambda: tracer.trace(model))  # noqa: B023 - called at once
            return functionalise(graph, model)
        except InterfaceError:
            raise
        except UntraceableError as error:
            path, reason = error.path, str(error)
        except Exception as error:
            path, reason = tracer.failed or "", f"{type(error).__name__}: {error}"
        if warn:
            _tell(model, path, reason)
        if path == "" or path in opaque or path not in paths:
            return None
        opaque.add(path)
    return None


class InterfaceError(TypeError):
    """A model that does not map one input to one tensor of logits."""


class UntraceableError(Exception):
    """A module whose graph would not mean the same as its code."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


def _tell(model: nn.Module, path: str, reason: str) -> None:
    module = model.get_submodule(path) if path else model
    if type(module).__module__.startswith("torch.nn"):
        return
    what = f"submodule '{path}' ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
    warnings.warn(
        f"{what} can't be traced and runs as one layer, at autograd's speed. Reason: {reason.splitlines()[0]}",
        stacklevel=2,
    )


def hooked(module: nn.Module) -> bool:
    """Whether calling the module runs user hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def signature(model: nn.Module) -> tuple[Any, ...]:
    """What a trace depends on: which modules there are, their mode, their hooks."""
    return tuple((id(m), type(m), m.training, hooked(m)) for m in model.modules())


def _modes() -> tuple[bool, bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
