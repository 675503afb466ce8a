from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ibp_triton as ibp
from ibp_triton.harness import data, grid, loading, methods, models, store, train
from ibp_triton.harness.batches import Batches

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


class StopError(Exception):
    """Stands in for a kill between two epochs."""


def first_run(path: Path, *overrides: str) -> grid.Run:
    return grid.runs(loading.load(path, overrides))[0]


def silent(_: store.Record) -> None:
    """Listen to nothing."""


def test_a_run_is_plain_sgd_with_the_papers_momentum_and_decay(tree: Tree, write: Write, tmp_path: Path) -> None:
    run = first_run(write(tree), "methods={bp: }", "training.channels_last=false")
    train.train(run, tmp_path, silent)
    dataset = data.load(run.data, 0)
    model = models.build(run.network, dataset.shape, 4, 0)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(2):
        for batch in Batches(dataset, run.training, run.seeds, None).epoch(epoch):
            gradients = torch.autograd.grad(F.cross_entropy(model(batch.x), batch.labels), list(model.parameters()))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                    v.mul_(0.9).add_(0.1 * g)
                    p.sub_(0.1 * 0.98**epoch * v)
    found = store.read_tensors(tmp_path / store.CHECKPOINT)
    assert found is not None
    for name, parameter in model.state_dict().items():
        assert torch.allclose(found[0][name], parameter, atol=1e-6), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_run_ends_with_the_same_bits(
    tree: Tree, write: Write, tmp_path: Path, precision: str, stop_after: int
) -> None:
    run = first_run(write(tree), "training.epochs=3", f"training.precision={precision}", "training.augment={}")

    def stop(record: store.Record) -> None:
        if record["epoch"] == stop_after:
            raise StopError

    train.train(run, tmp_path / "whole", silent)
    with pytest.raises(StopError):
        train.train(run, tmp_path / "stopped", stop)
    result = train.train(run, tmp_path / "stopped", silent)
    assert result["epochs"] == 3
    whole, stopped = ((tmp_path / name / store.CHECKPOINT).read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    losses = [[r["loss"] for r in store.read_metrics(tmp_path / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1]
    assert not (tmp_path / "stopped" / store.RESUME).exists()


def test_metrics_past_the_checkpoint_are_dropped(tree: Tree, write: Write, tmp_path: Path) -> None:
    run = first_run(write(tree))

    def stop(record: store.Record) -> None:
        store.write_metrics(tmp_path, [*store.read_metrics(tmp_path), {"epoch": 2, "loss": -1.0, "seconds": 1.0}])
        raise StopError

    with pytest.raises(StopError):
        train.train(run, tmp_path, stop)
    train.train(run, tmp_path, silent)
    records = store.read_metrics(tmp_path)
    assert [record["epoch"] for record in records] == [1, 2]
    assert all(record["loss"] > 0 for record in records)


def test_every_method_sees_the_same_subset_weights_and_order(tree: Tree, write: Write) -> None:
    bp, loss_ibp = grid.runs(loading.load(write(tree)))[:2]
    datasets = [data.load(run.data, run.seeds.subset) for run in (bp, loss_ibp)]
    assert torch.equal(datasets[0].train.images, datasets[1].train.images)
    states = [train.start(run, set_, torch.device("cpu")) for run, set_ in zip((bp, loss_ibp), datasets, strict=True)]
    pairs = zip(states[0].model.parameters(), states[1].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    orders = [
        [batch.labels for batch in Batches(d, run.training, run.seeds, None).epoch(1)]
        for d, run in zip(datasets, (bp, loss_ibp), strict=True)
    ]
    assert torch.equal(torch.cat(orders[0]), torch.cat(orders[1]))


def test_the_three_seeds_act_apart(tree: Tree, write: Write) -> None:
    def draws(**seeds: int) -> tuple[torch.Tensor, ...]:
        chosen = {"subset": 0, "weights": 0, "order": 0, **seeds}
        run = first_run(write({**tree, "seeds": [chosen], "data": {**tree["data"], "subset": 32}}))
        dataset = data.load(run.data, run.seeds.subset)
        state = train.start(run, dataset, torch.device("cpu"))
        index = next(iter(Batches(dataset, run.training, run.seeds, None).epoch(0))).x
        return dataset.train.images, next(state.model.parameters()).detach(), index

    base = draws()
    for name, position in (("subset", 0), ("weights", 1), ("order", 2)):
        other = draws(**{name: 1})
        differs = [not torch.equal(a, b) for a, b in zip(base, other, strict=True)]
        assert differs[position]
        if name != "subset":
            assert sum(differs) == 1


def test_beta_decays_with_the_learning_rate_only_if_asked(tree: Tree, write: Write, tmp_path: Path) -> None:
    seen: list[float] = []

    def betas(path: Path, *overrides: str) -> list[float]:
        seen.clear()
        run = grid.runs(loading.load(path, overrides))[1]
        train.train(run, tmp_path / run.name, silent)
        return list(seen)

    original = methods.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "build", lambda choice, factor=1.0: seen.append(factor) or original(choice, factor))
        assert betas(write(tree))[:2] == [1.0, 0.98]
        assert betas(write(tree), "training.beta_decay=false")[:2] == [1.0, 1.0]
    assert original(grid.MethodChoice("loss_ibp", 0.03, 1.0, "paper"), 0.5).beta == pytest.approx(0.015)


def test_summed_gradients_of_adversarial_training_move_twice_as_far(tree: Tree, write: Write, tmp_path: Path) -> None:
    moves = []
    for kind in ("mean", "sum"):
        tree["training"] |= {"at_gradient": kind, "epochs": 1, "batch_size": 64}
        run = first_run(write({**tree, "methods": {"at": {"epsilon": 0.05}}}))
        train.train(run, tmp_path / kind, silent)
        found = store.read_tensors(tmp_path / kind / store.CHECKPOINT)
        assert found is not None
        start = models.build(run.network, (1, 16, 16), 4, 0).state_dict()
        moves.append(found[0]["0.weight"] - start["0.weight"])
    assert moves[0].abs().max() > 0
    assert torch.allclose(moves[1], 2 * moves[0], rtol=1e-3, atol=1e-8)


def test_tangents_are_those_of_the_augmented_image(tree: Tree, write: Write) -> None:
    tree["training"]["augment"] = {}
    run = first_run(write({**tree, "methods": {"fast_tbp": {"beta": 0.001}}}))
    dataset = data.load(run.data, 0)
    batch = next(iter(Batches(dataset, run.training, run.seeds, run.tangents).epoch(0)))
    assert batch.tangents is not None
    assert torch.allclose(batch.tangents, ibp.lie_tangents(batch.x + dataset.mean), atol=1e-6)


def test_fixed_tangents_are_those_of_the_batch(tree: Tree, write: Write) -> None:
    run = first_run(write({**tree, "methods": {"tbp": {"beta": 0.001}}}))
    dataset = data.load(run.data, 0)
    batch = next(iter(Batches(dataset, run.training, run.seeds, run.tangents).epoch(0)))
    assert batch.tangents is not None
    assert torch.allclose(batch.tangents, ibp.lie_tangents(batch.x + dataset.mean), atol=1e-6)


def test_a_diverged_run_is_stored_as_such(tree: Tree, write: Write, tmp_path: Path) -> None:
    result = train.train(first_run(write(tree), "training.learning_rate=1e30"), tmp_path, silent)
    assert result["diverged"]
    assert result["final_loss"] is None
    assert "NaN" not in (tmp_path / store.METRICS).read_text(encoding="utf-8")


def test_result_and_checkpoint_of_a_run(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree["data"] |= {"subset": 40, "validation": 16}
    run = grid.runs(loading.load(write(tree), ["training.test_every=1"]))[1]
    records: list[store.Record] = []
    result = train.train(run, tmp_path, records.append)
    assert (result["train_examples"], result["test_examples"]) == (40, 32)
    assert result["test_error"] == records[-1]["test_error"]
    assert result["validation_error"] == records[-1]["validation_error"]
    assert 1.0 < result["predicted_ratio"] < 2.0
    model = models.build(run.network, (1, 16, 16), 4, 99)
    found, mean = store.read_tensors(tmp_path / store.CHECKPOINT), store.read_tensors(tmp_path / store.MEAN)
    assert found is not None
    assert mean is not None
    model.load_state_dict(found[0])
    test = data.load(run.data, 0).test
    wrong = (model(test.images - mean[0]["mean"]).argmax(1) != test.labels).float().mean()
    assert 100 * wrong.item() == pytest.approx(result["test_error"], abs=1e-4)


def test_optimizer_of_a_model_with_frozen_weights(tree: Tree, write: Write) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = train._optimizer(first_run(write(tree)), model)
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert math.isclose(optimizer.param_groups[0]["dampening"], 0.9)
