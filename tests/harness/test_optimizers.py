"""`training.optimizer`: any class of torch.optim by name, its options checked, its state resumed to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ibp_triton.errors import ConfigError, DamageError, NetworkError
from ibp_triton.harness import data, grid, loading, models, optimizers, store, train
from ibp_triton.harness.batches import Batches

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
MATRICES = "Muon"  # trains nothing but matrices


class StopError(Exception):
    """Stands in for a kill between two epochs."""


def first_run(tree: Tree, write: Write, optimizer: Any, **training: Any) -> grid.Run:
    training = {**tree["training"], "optimizer": optimizer, **training}
    return grid.runs(loading.load(write({**tree, "training": training})))[0]


def refusal(tree: Tree, write: Write, **training: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loading.load(write({**tree, "training": {**tree["training"], **training}}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("AdamWW", "training.optimizer: 'AdamWW' is no optimizer of torch.optim; did you mean AdamW?"),
        ("adamw", "training.optimizer: 'adamw' is no optimizer of torch.optim; did you mean AdamW?"),
        ("compile?", "is no optimizer of torch.optim; there are: ASGD, Adadelta"),
        ({"AdamW": {"weight_decy": 0.1}}, "AdamW takes no weight_decy; did you mean weight_decay?"),
        ({"SGD": {"x": 0.1}}, "SGD takes no x; its options: lr, momentum"),
        ({"AdamW": {"lr": -1.0}}, "training.optimizer: AdamW: Invalid learning rate: -1.0"),
        ({"AdamW": {"lr": 0}}, "training.optimizer: AdamW: lr must be a positive number, got 0"),
        ({"AdamW": {"betas": [0.9, 2.0]}}, "training.optimizer: AdamW: Invalid beta parameter"),
        ({"AdamW": {"weight_decay": "much"}}, "training.optimizer: AdamW: "),
        ({"AdamW": 3}, "training.optimizer: AdamW: expected its options, such as {lr: 0.001}, got 3"),
        ({"AdamW": {}, "SGD": {}}, "training.optimizer: expected an optimizer's name, or its name with options"),
        ("LBFGS", "training.optimizer: LBFGS can't train here: it needs a closure"),
        ("SparseAdam", "training.optimizer: SparseAdam can't train here: it needs sparse gradients"),
    ],
)
def test_what_is_wrong_is_one_sentence(tree: Tree, write: Write, optimizer: Any, expected: str) -> None:
    message = refusal(tree, write, optimizer=optimizer)
    assert expected in message
    assert ", got 'Adam" not in message
    assert len(message.splitlines()) == 1


def test_a_misspelt_key_means_the_optimizer(tree: Tree, write: Write) -> None:
    assert "training.optimiser: unknown key; did you mean optimizer?" in refusal(tree, write, optimiser="AdamW")


def test_the_options_of_the_papers_descent_stand_in_one_place(tree: Tree, write: Write) -> None:
    message = refusal(tree, write, optimizer="AdamW", learning_rate=0.1, weight_decay=0.0)
    assert "training: learning_rate, weight_decay beside optimizer; give AdamW's own options there" in message


@pytest.mark.parametrize("name", [name for name in optimizers.names() if name != MATRICES])
def test_every_optimizer_trains_and_a_stopped_run_ends_with_the_same_bits(
    tree: Tree, write: Write, tmp_path: Path, name: str
) -> None:
    run = first_run(tree, write, name, epochs=3)

    def stop(record: store.Record) -> None:
        if record["epoch"] == 2:
            raise StopError

    train.train(run, tmp_path / "whole", lambda _: None)
    with pytest.raises(StopError):
        train.train(run, tmp_path / "stopped", stop)
    train.train(run, tmp_path / "stopped", lambda _: None)
    whole, stopped = ((tmp_path / part / store.CHECKPOINT).read_bytes() for part in ("whole", "stopped"))
    assert whole == stopped
    losses = [record["loss"] for record in store.read_metrics(tmp_path / "whole")]
    assert len(set(losses)) == 3


def test_a_run_is_what_torch_does(tree: Tree, write: Write, tmp_path: Path) -> None:
    options = {"lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.1}
    run = first_run(tree, write, {"AdamW": options}, channels_last=False, decay=0.5)
    train.train(run, tmp_path, lambda _: None)
    dataset = data.load(run.data, 0)
    model = models.build(run.network, dataset.shape, 4, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5**epoch
        for batch in Batches(dataset, run.training, run.seeds, None).epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.x), batch.labels).backward()
            optimizer.step()
    found = store.read_tensors(tmp_path / store.CHECKPOINT)
    assert found is not None
    assert all(torch.allclose(found[0][n], value, atol=1e-5) for n, value in model.state_dict().items())


def test_it_is_a_part_of_what_a_run_is_and_older_runs_keep_their_names(tree: Tree, write: Write) -> None:
    plain = grid.runs(loading.load(write(tree)))[0]
    assert "optimizer" not in plain.config()["training"]
    names = {first_run(tree, write, o).name for o in ("Adam", {"Adam": {"lr": 0.001}}, {"Adam": {"lr": 0.01}})}
    assert len(names) == 2
    run = first_run(tree, write, {"Adam": {"lr": 1}})
    config = json.loads(json.dumps(run.config()))
    assert config["training"]["optimizer"] == {"Adam": {"lr": 1.0}}
    assert not {"learning_rate", "momentum", "dampening", "weight_decay"} & set(config["training"])
    assert grid.Run.from_config(config).name == run.name
    assert run.rate_in(1) == pytest.approx(0.98)


def test_one_that_cannot_train_the_network_says_so(tree: Tree, write: Write) -> None:
    run = first_run(tree, write, MATRICES)
    with pytest.raises(NetworkError, match=r"training.optimizer: Muon can't train this network: .*2D"):
        train._optimizer(run, nn.Conv2d(1, 1, 3))


def test_numbers_of_a_state_are_stored_and_what_is_neither_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    first, second = (torch.optim.SGD([parameter]) for _ in range(2))
    first.state[parameter] = {"count": 3, "trace": torch.ones(2), "none": None}
    optimizers.load(second, optimizers.tensors(first))
    assert second.state[parameter]["count"] == 3
    assert torch.equal(second.state[parameter]["trace"], torch.ones(2))
    first.state[parameter] = {"history": [1]}
    with pytest.raises(DamageError, match=r"SGD keeps history, a list, in its state, which can't be stored"):
        optimizers.tensors(first)
