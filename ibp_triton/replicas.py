"""Several models of one structure side by side: their tensors stacked, [R, ...], and what is each replica's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ibp_triton.errors import InputError, ModelError
from ibp_triton.layer import stacked_like_first
from ibp_triton.network import Network
from ibp_triton.randomness import RandomState
from ibp_triton.recording.interface import Pick

Tensors = dict[str, Tensor]


class ReplicatedNetwork:
    """R models of one structure (seeds × β × ε) for ``ReplicatedStep``, each with its own weights and draws.

    The models' parameters and buffers become views of stacked tensors [R, ...]; each is evaluated, stored and loaded
    alone, as before.

    Args:
        models: with parameters and buffers of the same names, shapes and dtypes on one device; no two may share any.
        seeds: of each replica's random numbers (dropout, a method's own draws), as of ``torch.manual_seed``; by default
            drawn by torch.
        backend: as for ``Network``.
        dtype: as for ``Network``.
        x: as for ``Network``.
        output: as for ``Network``.

    Attributes:
        networks: a ``Network`` for each model.
        parameters: the stacked ones by name.
        buffers: the stacked ones by name.

    Raises:
        ModelError (a TypeError): for models that differ or share tensors, and as of ``Network``.
        InputError (a ValueError): for another number of seeds.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        seeds: Sequence[int] | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        *,
        x: int | str = 0,
        output: Pick = None,
    ) -> None:
        self.networks = [Network(model, backend, dtype, x=x, output=output) for model in models]
        if not self.networks or not self.networks[0].parameters():
            raise ModelError("ReplicatedNetwork needs at least one model, and parameters in it")
        self.parameters: Tensors = {}
        self.buffers: Tensors = {}
        self._held: list[list[tuple[Tensor, int]]] = []
        self.own: list[dict[str, nn.Parameter]] = []  # of each replica
        self.gather()
        self.states: list[RandomState] = []  # of each replica's random numbers
        self.seed(torch.randint(2**62, (len(self),)).tolist() if seeds is None else seeds)

    def __len__(self) -> int:
        """R."""
        return len(self.networks)

    def seed(self, seeds: Sequence[int]) -> None:
        """Let each replica's random numbers go on as after ``torch.manual_seed``.

        Args:
            seeds: R of them.
        """
        if len(seeds) != len(self):
            raise InputError(f"{len(self)} replicas need as many seeds, not {len(seeds)}")
        device = next(iter(self.parameters.values())).device
        self.states = [seeded(int(seed), device) for seed in seeds]

    def gather(self) -> None:
        """Stack what the models have now: at first, and where one has got other tensors than its views.

        Raises:
            ModelError: for models that differ, or share a tensor.
        """
        if self._held and all(_holds(n.model, held) for n, held in zip(self.networks, self._held, strict=True)):
            return
        self.own = [network.parameters() for network in self.networks]
        buffers = [dict(network.model.named_buffers()) for network in self.networks]
        for each in (self.own, buffers):
            _check_alike(each)
        self.parameters = {name: _stacked([own[name] for own in self.own]) for name in self.own[0]}
        self.buffers = {name: _stacked([own[name] for own in buffers]) for name in buffers[0]}
        self._held = [[(a, a.data_ptr()) for a in _tensors(network.model)] for network in self.networks]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            yield from (a for a in own.values() if a is not None)


def _holds(model: nn.Module, held: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether these are the model's tensors, where they were."""
    now = list(_tensors(model))
    return len(now) == len(held) and all(
        a is b and a.data_ptr() == place for a, (b, place) in zip(now, held, strict=True)
    )


def _check_alike(each: Sequence[Mapping[str, Tensor]]) -> None:
    kinds = [{name: f"{list(a.shape)}, {a.dtype}, {a.device}" for name, a in own.items()} for own in each]
    for r, own in enumerate(kinds):
        odd = next((name for name in {**kinds[0], **own} if kinds[0].get(name) != own.get(name)), None)
        if odd is not None:
            raise ModelError(
                f"models[{r}] has '{odd}' as {own.get(odd, 'nothing')}, models[0] as {kinds[0].get(odd, 'nothing')}: "
                "replicas need one structure; give each structure a ReplicatedNetwork of its own"
            )
    owners: dict[int, int] = {}
    for r, own_tensors in enumerate(each):
        for name, a in own_tensors.items():
            if owners.setdefault(id(a), r) != r:
                raise ModelError(
                    f"models[{owners[id(a)]}] and models[{r}] share '{name}', and each replica trains its own: build "
                    "them one by one, or take copy.deepcopy of one"
                )


def _stacked(each: Sequence[Tensor]) -> Tensor:
    """[R, ...], in the memory format of the first; the tensors become views of it."""
    whole = stacked_like_first([a.detach() for a in each])
    for own, a in zip(whole, each, strict=True):
        a.data = own
    return whole


def seeded(seed: int, device: torch.device) -> RandomState:
    """As after ``torch.manual_seed``, which seeds every device alike."""
    cuda = torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None
    return RandomState(torch.Generator().manual_seed(seed).get_state(), cuda)


@contextmanager
def with_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> Iterator[Callable[[], Tensors]]:
    """Inside, the model has these buffers in place of its own; the call says which it has by then."""
    paths = {name: name.rpartition(".") for name in buffers}
    places = {name: (model.get_submodule(path)._buffers, own) for name, (path, _, own) in paths.items()}
    before = {name: held[own] for name, (held, own) in places.items()}

    def put(those: Mapping[str, Tensor | None]) -> None:
        for name, (held, own) in places.items():
            held[own] = those[name]

    put(buffers)
    try:
        yield lambda: {name: a for name, (held, own) in places.items() if (a := held[own]) is not None}
    finally:
        put(before)
