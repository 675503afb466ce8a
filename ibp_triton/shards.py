"""Models sharded by torch's ``fully_shard``: whole parameters one block at a time, gradients in pieces.

FSDP keeps one tensor for each whole parameter, whose memory it frees and fills again. What a forward pass recorded
refers to that tensor, so that a sweep may read it again whenever its block is open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibp_triton.errors import ModelError
from ibp_triton.world import Sums, World

FSDP = "torch.distributed.fsdp"


def is_sharded(p: Tensor) -> bool:
    """Whether a process has only its piece of it."""
    return type(p).__name__ == "DTensor"


def shards_of(model: nn.Module, world: World | None) -> Shards | None:
    """How the model is sharded; None for one that is not.

    Raises:
        ModelError: for one that is sharded in another way, or without its processes.
    """
    pieces = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    if not pieces:
        return None
    if world is None:
        raise ModelError(
            "the model is sharded over processes: pass Network(model, process_group=torch.distributed.group.WORLD)"
        )
    for name, p in pieces.items():
        mesh: Any = p.device_mesh  # type: ignore[attr-defined]
        if mesh.size() != dist.get_world_size(world.group):
            raise ModelError(
                f"parameter '{name}' is sharded over {mesh.size()} processes, and process_group= has "
                f"{dist.get_world_size(world.group)}: pass the group of all processes of the mesh"
            )
    return Shards(model, world)


class Shards:
    """The blocks of a sharded model: the modules that ``fully_shard`` was called on, each with parameters of its own.

    Every process must open the same blocks in the same order.

    Attributes:
        own: {name: parameter}, the whole ones: without numbers but while their block is open.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self._blocks: list[Any] = []  # one module of each
        self._block_of: dict[Any, int | None] = {}  # of a module; None for one without parameters of its own
        self._block: dict[str, int] = {}  # of a parameter
        self._names: list[list[str]] = []  # of the parameters of each
        self._open: set[int] = set()
        self.own: dict[str, nn.Parameter] = {}
        for module in model.modules():
            if hasattr(module, "unshard") and hasattr(module, "reshard"):
                self._find(module)
        self.own = {name: self.own.get(name, p) for name, p in model.named_parameters()}
        left = next((name for name, p in self.own.items() if is_sharded(p)), None)
        if left is not None:
            raise ModelError(
                f"parameter '{left}' is a DTensor that fully_shard alone does not explain, as in tensor parallelism: "
                "shard the plain model by torch.distributed.fsdp.fully_shard"
            )

    def _find(self, module: Any) -> None:
        """Open a block once, to know its parameters."""
        before = dict(self.model.named_parameters())
        module.unshard()
        found = {n: p for n, p in self.model.named_parameters() if p is not before[n]}
        module.reshard()
        for name, p in found.items():
            if p.dtype != before[name].dtype:
                raise ModelError(
                    f"parameter '{name}' would be gathered as {p.dtype}: leave mp_policy= of fully_shard out"
                )
        if not found:
            self._block_of[module] = None
            return
        self._block_of[module] = self._block.get(next(iter(found)), len(self._blocks))
        if self._block_of[module] == len(self._blocks):
            self._block |= dict.fromkeys(found, len(self._blocks))
            self._blocks.append(module)
            self._names.append(list(found))
            self.own |= found

    def pieces(self) -> dict[str, nn.Parameter]:
        """{name: parameter} as an optimizer has them."""
        self.close()
        return dict(self.model.named_parameters())

    def replaced_by(self, parameters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """The whole parameters, if none is to be another one."""
        if parameters:
            raise ModelError("a sharded model computes with its own parameters: leave parameters= out")
        return self.own

    def open(self, names: Collection[str]) -> None:
        """See to the numbers of these parameters; other blocks are closed first."""
        wanted = {self._block[name] for name in names if name in self._block}
        if wanted <= self._open:
            return
        for block in sorted(self._open - wanted):
            self._close(block)
        for block in sorted(wanted - self._open):
            self._gather(block)

    def close(self) -> None:
        """Only pieces are left, also of what the model's own forward pass has opened."""
        for block in range(len(self._blocks)):
            self._close(block)

    def _gather(self, block: int) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._blocks[block].unshard()
        self._open.add(block)

    def _close(self, block: int) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._blocks[block].reshard()
        self._open.discard(block)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, a block is open while its module runs, and FSDP's own hooks, which are for autograd, don't run."""
        self.close()
        replaced = []
        for module, block in self._block_of.items():
            replaced += _replace(module._forward_pre_hooks, partial(self._enter, block))
            replaced += _replace(module._forward_hooks, partial(self._leave, block))
        try:
            yield
        finally:
            for hooks, key, hook in replaced:
                hooks[key] = hook
            self.close()

    def _enter(self, block: int | None, *_: Any) -> None:
        if block is None:
            return
        self._gather(block)
        for name in self._names[block]:
            if self.model.get_parameter(name) is not self.own[name]:
                raise ModelError(
                    f"this version of torch gathers '{name}' into another tensor each time: use torch 2.13"
                )

    def _leave(self, block: int | None, *_: Any) -> None:
        if block is not None:
            self._close(block)


def _replace(hooks: dict[int, Any], own: Any) -> list[tuple[dict[int, Any], int, Any]]:
    """Put a hook in the place of FSDP's; where they were."""
    found = [(hooks, key, h) for key, h in hooks.items() if getattr(h, "__module__", "").startswith(FSDP)]
    for _, key, _ in found:
        hooks[key] = own
    return found


class Scattered:
    """Gradients of a sharded model on their way: of each the sum's own piece is kept, as soon as it is made."""

    def __init__(self, world: World, parameters: Mapping[str, Tensor], forward: bool) -> None:
        self.parameters, self._found = parameters, dict[str, Tensor]()
        self._rest: Sums = world.sums({n: p for n, p in parameters.items() if not is_sharded(p)}, forward=forward)

    def take(self, name: str, d: Tensor) -> None:
        """This process's whole gradient of a parameter."""
        p = self.parameters[name]
        if is_sharded(p):
            self._found[name] = _scattered(d.to(p.dtype), p)
        else:
            self._rest.take(name, d)

    def finish(self, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of all parameters, once this process's others are ``rest``; zero where there is none."""
        for name, d in rest.items():
            if name in self.parameters:
                self.take(name, d)
        found = self._found | self._rest.finish({})
        return {name: found[name] if name in found else torch.zeros_like(p) for name, p in self.parameters.items()}


def _scattered(d: Tensor, p: Any) -> Tensor:
    """This process's piece of Σ d."""
    from torch.distributed.tensor import DTensor, Partial

    parts = [Partial() for _ in range(p.device_mesh.ndim)]
    whole = DTensor.from_local(d.contiguous(), p.device_mesh, parts, run_check=False)
    return whole.redistribute(placements=p.placements)
