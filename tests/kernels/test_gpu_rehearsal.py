"""`make gpu` rehearsed on the CPU: every part of it, on interpreted kernels and a clock that is none."""

import json
import time

import pytest
import torch
from torch import nn

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cells, sections
from benchmarks.gpu.device import Cuda, slug
from benchmarks.gpu.sections import QUICK, Plan
from ibp_triton.bench import by_hand
from ibp_triton.bench.candidates import Case, Entry
from ibp_triton.kernels import tiles
from ibp_triton.kernels.workbench import autotune, model
from ibp_triton.kernels.workbench.model import Counts


def small():
    """Two layers: what a convolution does is seen elsewhere, and an interpreted one takes its time."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 10))


SMALL = Entry(small, (1, 4, 4), "mlp", flat=True)
CARD = "NVIDIA H100 80GB HBM3"


class Rehearsal(Cuda):
    """The same on the CPU: a graph is the call itself, and each call is timed once."""

    name, copied, side = "cpu", 1 << 10, 8

    def environment(self):
        return {"gpu": CARD, "torch": torch.__version__}

    def graphed(self, run):
        run()
        return run

    def seconds(self, candidates, rounds):
        found = {}
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            found[name] = time.perf_counter() - start
        return found

    def milliseconds(self, run):
        run()
        return float(len(self.__dict__.setdefault("calls", [])) or self.calls.append(run) or 9)


def plan(precision="fp32", **changes):
    grid = cells.Grid(("small",), (2,), (precision,), ("loss_ibp",), SMALL)
    return Plan(**{"grid": grid, "tests": (), "tuning": 0.0, "rounds": 1, **changes})


@pytest.fixture
def counted(monkeypatch):
    """No compiler in an interpreting process: the model gets numbers."""
    monkeypatch.setattr(model, "counts", lambda launch, target: Counts(launch.name, 1, 4, 4, 100, 1, 10, 10, 10))
    monkeypatch.setattr(cells, "compiled", lambda step: step)
    monkeypatch.setattr(sections, "tested", lambda arguments: {"pytest": "3 passed"})


def test_all_of_it(counted, tmp_path, capsys):
    failed = command.write(Rehearsal(), plan(), tmp_path)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "nvidia-h100-80gb-hbm3.json").read_text())
    assert not failed, found
    assert found["failed"] == {}
    assert [sorted(row["us"]) for row in found["steps"]] == [sorted(["ours", "captured", *cells.BASELINES])]
    assert all(row["off"] <= cells.LIMITS["fp32"] for row in found["steps"])
    assert [row["off"] for row in found["captured"]] == [0]
    assert found["reach"]["model"] == "H100"
    assert len(found["kernels"]) >= 8
    assert all(row["share"] > 0 for row in found["kernels"])
    slow = [line for line in found["short"] if "the model's high end is" in line]
    assert len(slow) == len(found["kernels"])  # an interpreter is no GPU
    assert "Fell short" in printed
    page = (tmp_path / "nvidia-h100-80gb-hbm3.md").read_text()
    assert page.startswith(f"# {CARD}\n")
    assert page.count("\n| loss_ibp |") == 1
    assert page.count("\n| wgrad |") == 2


def test_what_is_left_or_fails_is_named(counted, monkeypatch, tmp_path):
    def refuse(step):
        raise RuntimeError("no second derivative\nat all")

    monkeypatch.setattr(cells, "compiled", refuse)
    monkeypatch.setattr(sections, "tested", lambda arguments: refuse(None))
    monkeypatch.setattr(cells, "off_eager", lambda *_: {**row, "failed": "off"})
    monkeypatch.setattr(sections, "kernels", lambda *_: [])
    row = {"method": "loss_ibp", "network": "small", "batch": 2, "precision": "fp32", "off": 1.0}
    assert command.write(Rehearsal(), plan("bf16"), tmp_path, "-x")
    found = json.loads((tmp_path / "nvidia-h100-80gb-hbm3-x.json").read_text())
    assert found["failed"] == {"tests": "RuntimeError: no second derivative"}
    assert found["short"][0] == "tests failed: RuntimeError: no second derivative"
    assert found["steps"][0]["without"] == {"torch.compile": "RuntimeError: no second derivative"}
    page = (tmp_path / "nvidia-h100-80gb-hbm3-x.md").read_text()
    assert "- loss_ibp bf16, torch.compile: RuntimeError: no second derivative" in page
    rows = list(sections.steps(Rehearsal(), plan(measuring=-1.0)))
    assert [row["left"] for row in rows] == ["the time was over"]


def test_tiles_are_tuned_into_a_file_and_read_back(monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "tuned", {})
    monkeypatch.setattr(autotune, "CANDIDATES", {"contract": [tiles.Config(32, 32, 32)], "wgrad": []})
    found = sections.tiles(Rehearsal(), plan(tuning=60.0), tmp_path, CARD)
    assert found == {"file": "nvidia-h100-80gb-hbm3-tiles.json", "tiles": 1, "loaded": 1}
    ((*_, sizes),) = tiles.tuned
    assert len(sizes) == 4
    assert sections.tiles(Rehearsal(), plan(), tmp_path, CARD) == {}


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    monkeypatch.setattr(cells.parity, "parity", lambda case, method: float("nan"))
    case, precision, method = next(plan().grid.cells("cpu"))
    row = cells.measured(Rehearsal(), case, precision, method, 1, inductor=False)
    assert "us" not in row
    assert "off autograd's gradient by nan" in row["failed"]


def test_pytest_is_run_and_its_failures_are_named(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text("def test_good(): pass\n")
    assert sections.tested((str(path),))["pytest"].startswith("1 passed")
    path.write_text("def test_bad(): assert False\n")
    with pytest.raises(RuntimeError, match=r"1 failed.*test_bad"):
        sections.tested((str(path),))
    path.write_text("import pytest\n@pytest.mark.skip\ndef test_left(): pass\n")
    with pytest.raises(RuntimeError, match="1 skipped"):
        sections.tested((str(path),))


def test_dynamo_traces_autograds_step(monkeypatch):
    """As inductor will get it, without inductor."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, mode, **options: compile(step, backend="eager", **options))
    step = by_hand.autograd(Case("small", 2, "fp32", own=SMALL), "loss_ibp")
    torch.testing.assert_close(cells.compiled(step)()[0], step()[0])


def test_without_a_device_a_sentence():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        command.main(["--quick"])


def test_cards_and_plans():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert cells.card_of("NVIDIA H200").name == "H200"
    assert cells.card_of("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert cells.card_of("NVIDIA H100 PCIe") is None
    assert cells.card_of("Tesla T4") is None
    assert len(list(Plan().grid.cells("cuda"))) == 2 * 3 * 3 * 7
    assert len(list(QUICK.grid.cells("cuda"))) == 6
