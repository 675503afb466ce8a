from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.errors import ConfigError
from ibp_triton.harness import compiled, grid, loading, models, store, train
from ibp_triton.harness.batches import Batch
from ibp_triton.harness.compiled import CompiledStep, EagerStep
from ibp_triton.harness.config import NetworkChoice

Tree = dict[str, Any]
Write = Callable[[Tree], Path]

METHODS = {
    "bp": ibp.BP(),
    "loss_ibp": ibp.LossIBP(0.3),
    "loss_ibp_exact": ibp.LossIBP(0.3, semantics="exact"),
    "prediction_ibp": ibp.PredictionIBP(0.3),
    "at": ibp.AdversarialTraining(0.1),
    "tbp": ibp.TangentBP(0.1),
    "fast_tbp": ibp.FastTangentBP(0.1),
}


def first_run(path: Path, *overrides: str) -> grid.Run:
    return grid.runs(loading.load(path, overrides))[0]


def silent(_: store.Record) -> None:
    """Listen to nothing."""


def narrow() -> nn.Module:
    config = NetworkChoice(name="paper_mnist", widths=[4, 4], hidden=8, init="uniform")
    return models.build(config, (1, 16, 16), 4, 0)


def eager(model: nn.Module, momentum: float = 0.9, decay: float = 0.0, **network: Any) -> EagerStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=decay)
    for parameter in model.parameters() if momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return EagerStep(ibp.Network(model, **network), optimizer)


def batch(method: ibp.Method, count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 16, 16, generator=generator)
    tangents = ibp.lie_tangents(x) if method.needs_tangents else None
    return Batch(x, torch.randint(0, 4, (count,), generator=generator), tangents)


def parity(method: ibp.Method, **options: Any) -> float:
    data = batch(method)
    fast = CompiledStep(eager(narrow(), **options), method, data)
    return compiled._parity(eager(narrow(), **options), fast, method, data)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded graph runs as it is: all but inductor's part, without its compile time."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.mark.parametrize("key", METHODS)
def test_the_recorded_step_is_the_eager_step(recorded: None, key: str) -> None:
    assert parity(METHODS[key]) < 1e-6


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"decay": 0.1}, {"dtype": torch.bfloat16}])
def test_the_optimizers_options_and_half_precision(recorded: None, options: dict[str, Any]) -> None:
    assert parity(METHODS["loss_ibp"], **options) < 1e-6


def test_beta_and_the_rate_may_change_and_other_shapes_run_eagerly(recorded: None) -> None:
    plain, other = eager(narrow()), eager(narrow())
    fast = CompiledStep(other, ibp.LossIBP(0.3), batch(ibp.BP()))
    for beta, rate, count in ((0.3, 0.1, 8), (0.1, 0.05, 8), (0.1, 0.05, 5)):
        for step in (plain, fast):
            step.optimizer.param_groups[0]["lr"] = rate
        method = ibp.LossIBP(beta)
        assert torch.allclose(plain(method, batch(method, count)), fast(method, batch(method, count)))
    found, expected = compiled._state(fast), compiled._state(plain)
    assert all(compiled._distance(found[name], value) < 1e-6 for name, value in expected.items())


def test_a_model_with_running_statistics_stays_eager_and_untouched(recorded: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step, method = eager(model), METHODS["loss_ibp"]
    with pytest.warns(UserWarning, match=r"trained by the eager step; the compiled step is off"):
        assert compiled.compiled(step, method, batch(method), "fp32") is step
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_that_trains_differently_is_not_used(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.CompiledStep, "_update", lambda *_: None)
    step, method = eager(narrow()), METHODS["bp"]
    with pytest.warns(UserWarning, match=r"trained by the eager step; the compiled step is off by 1 after 3 steps"):
        assert compiled.compiled(step, method, batch(method), "fp32") is step


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    step, method = eager(narrow()), METHODS["bp"]
    with pytest.warns(UserWarning, match=r"eager step; RuntimeError: no C\+\+ compiler$"):
        assert compiled.compiled(step, method, batch(method), "fp32") is step


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_run_ends_where_the_eager_run_does(tree: Tree, write: Write, tmp_path: Path) -> None:
    path = write({**tree, "methods": {"loss_ibp": {"beta": 0.03}}})  # 64 examples in batches of 24: the last has 16
    for name, value in (("eager", "false"), ("fast", "true")):
        run = first_run(path, "training.batch_size=24", f"training.compile={value}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            train.train(run, tmp_path / name, silent)
    found, expected = (store.read_tensors(tmp_path / name / store.CHECKPOINT) for name in ("fast", "eager"))
    assert found is not None
    assert expected is not None
    assert any(not torch.equal(found[0][name], value) for name, value in expected[0].items()), "nothing was compiled"
    assert all(compiled._distance(found[0][name], value) < 1e-4 for name, value in expected[0].items())


def test_only_a_compiled_run_has_another_name(tree: Tree, write: Write) -> None:
    path = write(tree)
    plain, off, on = (first_run(path, *o) for o in ([], ["training.compile=false"], ["training.compile=true"]))
    assert plain.name == off.name != on.name
    assert "compile" not in plain.config()["training"]
    assert grid.Run.from_config(on.config()).training.compile


def test_compiling_is_for_the_cpu(tree: Tree, write: Write) -> None:
    with pytest.raises(ConfigError, match=r"compile: true is for device: cpu, not cuda"):
        loading.load(write(tree), ["training.compile=true", "training.device=cuda"])
