"""A stand-in for CUDA graphs: the operators of a step are recorded, and played again on the same tensors."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ibp_triton import captured_step


def stand_in(monkeypatch):
    """Steps on the CPU are captured too; returns the graphs, each when it is begun."""
    graphs = []
    monkeypatch.setattr(captured_step, "_can_capture", lambda device: True)
    monkeypatch.setattr(captured_step, "_graph", lambda: graphs.append(Replayed()) or graphs[-1])
    monkeypatch.setattr(captured_step, "_capturing", Recording)
    monkeypatch.setattr(captured_step, "_current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(captured_step, "_side_stream", lambda device: contextlib.nullcontext())
    return graphs


class Replayed:
    """Stands for a CUDA graph: the operators of a step, played again on the same tensors."""

    def __init__(self):
        self.played = []

    def replay(self):
        for function, args, kwargs, out in self.played:
            with torch.no_grad():
                again = function(*args, **kwargs)
                tree_map(lambda a, b: b.copy_(a) if isinstance(a, torch.Tensor) and a is not b else None, again, out)


class Recording(TorchDispatchMode):
    """A capture: it trains nothing, so what the operators wrote to is put back at the end."""

    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, []

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, numbers in reversed(self.before):
                tensor.copy_(numbers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        unsaid = (3, 4) if func is torch.ops.aten.native_batch_norm.default and args[5] else ()  # running statistics
        for place, (value, argument) in enumerate(zip(args, func._schema.arguments, strict=False)):
            if place in unsaid or (argument.alias_info is not None and argument.alias_info.is_write):
                self.before += [(t, t.detach().clone()) for t in tree_leaves(value)]
        out = func(*args, **(kwargs or {}))
        bare = (torch.ops.aten.detach.default, torch.ops.aten.new_empty_strided.default)  # no numbers of their own
        if func not in bare and not func.is_view:
            self.graph.played.append((func, args, kwargs or {}, out))
        return out
