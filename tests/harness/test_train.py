from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ibp_triton as ibp
from ibp_triton.harness import data, grid, loading, models, store, train
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


def stopped(run: grid.Run, folder: Path, after: int) -> None:
    """A run that was killed after an epoch."""

    def stop(record: store.Record) -> None:
        if record["epoch"] == after:
            raise StopError

    with pytest.raises(StopError):
        train.train(run, folder, stop)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def foreign(path: Path) -> None:
    found = store.read_tensors(path)
    assert found is not None
    store.write_tensors(path, {**found[0], "model/0.weight": torch.zeros(9, 1, 4, 4)}, found[1])


def of_another_run(path: Path) -> None:
    found = store.read_tensors(path)
    assert found is not None
    store.write_tensors(path, found[0], {**found[1], "run": "bp-0"})


@pytest.mark.parametrize(
    ("damages", "word"),
    [
        ({store.METRICS: Path.unlink}, None),
        ({store.METRICS: lambda path: path.write_bytes(b"")}, None),
        ({store.METRICS: lambda path: path.write_bytes(path.read_bytes()[:-20])}, None),
        ({store.RESUME: flip}, "damaged; the run goes on after epoch 2"),
        ({store.RESUME: foreign}, "of another network; the run goes on after epoch 2"),
        ({store.RESUME: of_another_run}, "of another run, bp-0; the run goes on after epoch 2"),
        ({store.RESUME: flip, store.PREVIOUS: flip}, "damaged; the run is trained from the start"),
        ({store.RESUME: Path.unlink, store.PREVIOUS: Path.unlink}, "missing, 3 epochs had been done"),
        ({store.RESUME: Path.unlink, store.METRICS: Path.unlink}, None),
    ],
)
def test_whatever_is_damaged_the_run_ends_with_the_same_bits(
    tree: Tree, write: Write, tmp_path: Path, damages: dict[str, Callable[[Path], Any]], word: str | None
) -> None:
    run, said = first_run(write(tree), "training.epochs=4"), list[str]()
    train.train(run, tmp_path / "whole", silent)
    stopped(run, tmp_path / "run", after=3)
    for name, damage in damages.items():
        damage(tmp_path / "run" / name)
    train.train(run, tmp_path / "run", silent, None, said.append)
    whole, resumed = (tmp_path / name for name in ("whole", "run"))
    assert (whole / store.CHECKPOINT).read_bytes() == (resumed / store.CHECKPOINT).read_bytes()
    assert [r["loss"] for r in store.read_metrics(whole)] == [r["loss"] for r in store.read_metrics(resumed)]
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in resumed.iterdir())
    assert [word in text for text in said] == [True] if word else said == []


def tied(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[4].weight = model[2].weight
    return model


class Rows(nn.Module):
    """An LSTM along the rows: of its exact penalties every step but the first is autograd's."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(shape[-1], 8, batch_first=True), nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.cells(x.flatten(1, 2))[0][:, -1])
        return found


@pytest.mark.parametrize("build", [tied, Rows])
def test_other_peoples_models_are_trained_stored_and_resumed(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    module = ModuleType("other_model")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_model", module)
    methods = {"loss_ibp": {"beta": 0.1, "semantics": "exact"}}
    run = first_run(write({**tree, "network": {"import": "other_model:build"}, "methods": methods}))
    train.train(run, tmp_path / "whole", silent)
    stopped(run, tmp_path / "run", after=1)
    train.train(run, tmp_path / "run", silent)
    whole, resumed = ((tmp_path / name / store.CHECKPOINT).read_bytes() for name in ("whole", "run"))
    assert whole == resumed


def test_every_method_sees_the_same_subset_weights_and_order(tree: Tree, write: Write) -> None:
    bp, loss_ibp = grid.runs(loading.load(write(tree)))[:2]
    datasets = [data.load(run.data, run.seeds.subset) for run in (bp, loss_ibp)]
    assert torch.equal(datasets[0].train.images, datasets[1].train.images)
    states = [train.start(run, set_) for run, set_ in zip((bp, loss_ibp), datasets, strict=True)]
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
        state = train.start(run, dataset)
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

    original = ibp.LossIBP.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ibp.LossIBP, "parts", lambda self, *x, **y: seen.append(self.beta) or original(self, *x, **y))
        assert betas(write(tree))[:: len(seen) // 2] == pytest.approx([0.03, 0.03 * 0.98])
        assert set(betas(write(tree), "training.beta_decay=false")) == {0.03}
    trades = {"trades": {"lam": 6.0, "epsilon": 0.1, "step_size": 0.02, "steps": 5}}
    assert first_run(write({**tree, "methods": trades})).method_in(1) == ibp.TRADES(6.0, 0.1, 0.02, 5)


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
    assert (result["diverged_step"], result["last_good_epoch"]) == (2, 0)
    assert result["final_loss"] is None
    assert "NaN" not in (tmp_path / store.METRICS).read_text(encoding="utf-8")


def test_the_state_before_it_diverged_is_kept(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = first_run(write(tree), "training.epochs=4"), ibp.EagerStep.__call__
    train.train(first_run(write(tree), "training.epochs=2"), tmp_path / "two", silent)
    calls = []

    def break_at_10(self: ibp.EagerStep, *rest: Any) -> ibp.Parts:
        calls.append(1)
        if len(calls) == 10:  # the second step of the third epoch
            next(self.network.model.parameters()).data.fill_(math.nan)
        return step(self, *rest)

    monkeypatch.setattr(ibp.EagerStep, "__call__", break_at_10)
    result = train.train(run, tmp_path / "four", silent)
    assert (result["diverged_step"], result["last_good_epoch"]) == (10, 2)
    good, two = (tmp_path / name for name in (f"four/{store.LAST_GOOD}", f"two/{store.CHECKPOINT}"))
    assert good.read_bytes() == two.read_bytes()


def test_a_mask_of_infinities_has_not_diverged() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert train._is_finite(model)
    model.weight.data[0, 0] = math.inf
    assert not train._is_finite(model)


def test_weights_that_are_no_numbers_have_diverged_though_the_loss_before_was_one() -> None:
    records = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.4, "diverged_step": 8}]
    assert train.divergence(records) == {"diverged": True, "diverged_step": 8, "last_good_epoch": 1}
    recovered = [{"epoch": 1, "loss": None, "diverged_step": 3}, {"epoch": 2, "loss": 0.4}]
    assert train.divergence(recovered) == {"diverged": False}


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
