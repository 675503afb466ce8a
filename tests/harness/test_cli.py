from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import ibp_triton as ibp
from ibp_triton.harness import cli, estimates, evaluate, loading

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HARNESS = ROOT / "ibp_triton" / "harness"


def ibp_triton(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ibp-triton", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data folder, no cache, and the examples folder importable."""
    monkeypatch.delenv("IBP_TRITON_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_passes_a_dry_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert ibp_triton(monkeypatch, "run", str(config), "--dry-run") == 0
    out = capsys.readouterr().out
    assert "bp" in out
    assert "left with" in out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_tells_what_each_run_still_needs(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tree |= {"output": str(tmp_path / "out"), "methods": {"bp": None}, "seeds": [0, 1]}
    config = write(tree)
    assert ibp_triton(monkeypatch, "run", str(config)) == 0
    first, second = (tmp_path / "out" / "runs").iterdir()
    next(first.glob("evaluation-*.json")).unlink()
    (second / "result.json").unlink()
    (second / "metrics.jsonl").write_text('{"epoch": 1}\n', encoding="utf-8")
    capsys.readouterr()
    more = ("--set", "seeds=[0, 1, 2]", "--set", "methods={bp: null, fast_at: {epsilon: 0.1}}", "--only", "method=bp")
    assert ibp_triton(monkeypatch, "run", str(config), "--dry-run", *more) == 0
    states = [line.split("│")[-2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert sorted(states) == ["50% done", "to do", "to evaluate"]


SMALL = (
    "data={source: synthetic, size: 16, channels: 1, classes: 4, examples: 48, holdout: 16, validation: 8}",
    "network={name: paper_mnist, widths: [4, 4], hidden: 8, init: uniform, pool: ceil}",
    "training.epochs=1",
    "training.batch_size=16",
    "evaluate.examples=8",
    "seeds=[0]",
    "workers=1",
)


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_scaled_down_version_of_every_config_runs_to_its_report(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Overrides only; each variant keeps what it changes, except the size of its subset and its epochs."""
    overrides = [*SMALL, f"output={tmp_path}/out", f"runs={tmp_path}/out/runs"]
    tree = loading.read_tree(config)
    shrunk = {"data.subset": 24, "data.crop": None, "training.epochs": 1}
    for label, variant in tree.get("variants", {}).items():
        small = {key: shrunk.get(key, value) for key, value in variant.items()}
        overrides.append(f"variants.{label}={small}".replace("None", "null"))
    if config.stem == "own_model":
        overrides[1] = "network.options.width=4"
    arguments = [part for text in overrides for part in ("--set", text)]
    assert ibp_triton(monkeypatch, "run", str(config), *arguments) == 0
    assert ibp_triton(monkeypatch, "report", f"{tmp_path}/out") == 0
    text = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "runs are finished" in text
    assert text.split("\n\n")[1].split()[0] == text.split("\n\n")[1].split()[2], "every run is finished"
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_run_evaluate_and_report(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tree)
    assert ibp_triton(monkeypatch, "run", str(path), "--only", "method=bp", "--only", "seed=0") == 0
    assert "[1/1] bp seed 0: error" in capsys.readouterr().out
    folders = list((tmp_path / "out" / "runs").iterdir())
    assert len(folders) == 1
    assert ibp_triton(monkeypatch, "evaluate", str(folders[0]), "--set", "adversarial=[0.0, 0.1]") == 0
    assert "adversarial" in capsys.readouterr().out
    assert len(list(folders[0].glob("evaluation-*.json"))) == 2
    assert ibp_triton(monkeypatch, "report", str(tmp_path / "out")) == 0
    assert "1 of 4 runs are finished" in (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")


def test_quiet_commands_print_errors_alone(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(write({**tree, "methods": {"bp": None}, "seeds": [0]}))
    assert ibp_triton(monkeypatch, "run", path, "--quiet") == 0
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert ibp_triton(monkeypatch, "evaluate", str(folder), "--set", "adversarial=[0.1]", "-q") == 0
    assert ibp_triton(monkeypatch, "report", str(tmp_path / "out"), "--quiet") == 0
    assert "".join(capfd.readouterr()) == ""
    assert (tmp_path / "out" / "report.html").exists()
    assert ibp_triton(monkeypatch, "run", path, "--quiet", "--set", "data.source=arrays") == 1
    assert "source arrays needs data.path" in capfd.readouterr().err.replace("\n", " ")


def test_a_dry_run_lists_runs_for_programs(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tree))
    assert ibp_triton(monkeypatch, "run", path, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in found] == [
        "bp seed 0",
        "loss_ibp 0.03 seed 0",
        "bp seed 1",
        "loss_ibp 0.03 seed 1",
    ]
    assert found[0]["ratio"] == 1 < found[1]["ratio"]
    assert {one["state"] for one in found} == {"to do"}
    assert [one["examples"] for one in found] == [64] * 4
    assert ibp_triton(monkeypatch, "run", path, "--json") == 1
    assert "--json is of a dry run's list; add --dry-run" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "none.yaml"], "none.yaml: cannot be read"),
        (["evaluate", "nowhere"], "nowhere: no config.json; give the folder of a run"),
        (["report", "nowhere"], "nowhere: no experiment.yaml; give the folder"),
        (["run", "quickstart", "--set", "output=config.json"], "a folder is needed there: move the file away"),
        (["evaluate", ".", "--device", "cuda:99"], "--device: cuda:99 cannot be used here"),
    ],
)
def test_errors_are_one_message_without_traceback(
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert ibp_triton(monkeypatch, *arguments) == 1
    assert expected in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("config", ['{"name": "a web project"}', "{}", "{", '{"data": 3}'])
def test_evaluating_another_folder_touches_nothing_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    for name in (".eslintrc.json", ".env.local", ".config.json.123.ibp-tmp"):
        (tmp_path / name).write_text("precious", encoding="utf-8")
    assert ibp_triton(monkeypatch, "evaluate", str(tmp_path)) == 1
    assert "config.json" in capsys.readouterr().err.replace("\n", "")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_large_dry_run_shows_the_first_runs_and_counts_all(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree |= {"seeds": list(range(3000)), "methods": {"bp": None, "loss_ibp": {"beta": [0.1, 0.2]}}, "select": "test"}
    begin = time.process_time()
    assert ibp_triton(monkeypatch, "run", str(write(tree)), "--dry-run") == 0
    out = capsys.readouterr().out
    assert time.process_time() - begin < 6
    assert out.count("to do") == cli.SHOWN
    assert f"… and {9000 - cli.SHOWN} more" in out
    assert "9000 runs, about" in out


def test_a_dry_run_reads_each_recipe_and_each_evaluation_once(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[str] = []
    program, passes = estimates._program.__wrapped__, evaluate.passes
    estimates._program.cache_clear()
    monkeypatch.setattr(estimates, "_program", lru_cache(lambda method: read.append(method.key) or program(method)))
    monkeypatch.setattr(evaluate, "passes", lambda choice: read.append("evaluation") or passes(choice))
    tree |= {"seeds": list(range(40)), "methods": {"bp": None, "loss_ibp": {"beta": [0.1, 0.2]}}, "select": "test"}
    assert ibp_triton(monkeypatch, "run", str(write(tree)), "--dry-run") == 0
    assert "120 runs" in capsys.readouterr().out
    assert sorted(read) == ["bp", "evaluation", "loss_ibp", "loss_ibp"]


MODEL = "print('{name} is imported')\nfrom torch import nn\n"
MODEL += "def build(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(256, classes))\n"


def test_a_dry_run_imports_what_its_rows_name_once_and_says_so(tree: Tree, write: Write, tmp_path: Path) -> None:
    for name in ("first_net", "second_net"):
        (tmp_path / f"{name}.py").write_text(MODEL.format(name=name), encoding="utf-8")
    (tmp_path / "wave.py").write_text("raise SystemExit('the standard module is hidden')", encoding="utf-8")
    (tmp_path / "first_net.py").write_text(MODEL.format(name="first_net") + "import wave\n", encoding="utf-8")
    tree |= {"network": {"import": "first_net:build"}, "output": "out"}
    tree["variants"] = {"a": {}, "b": {"network": {"import": "second_net:build"}}}
    command = [
        sys.executable,
        "-m",
        "ibp_triton.harness.cli",
        "run",
        str(write(tree)),
        "--dry-run",
        "--only",
        "variant=a",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("first_net is imported") == 1
    assert "second_net" not in done.stdout
    assert f"imported first_net ({tmp_path / 'first_net.py'})" in done.stdout


@pytest.mark.parametrize(
    "bad", [{"network": {"import": "no_such_module:build"}}, {"network.widths": [4]}, {"network.hidden": 10**12}]
)
def test_one_network_that_cannot_be_built_leaves_the_other_runs(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Tree
) -> None:
    config = write({**tree, "seeds": [0], "methods": {"bp": None}, "variants": {"bad": bad, "good": {}}})
    assert ibp_triton(monkeypatch, "run", str(config)) == 1
    assert len(list((tmp_path / "out" / "runs").glob("*/result.json"))) == 1


def test_unknown_evaluation_keys_name_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert ibp_triton(monkeypatch, "evaluate", str(tmp_path), "--set", "adverserial=[0.1]") == 1
    assert "adverserial: unknown key; did you mean adversarial?" in capsys.readouterr().err.replace("\n", " ")


def test_module_runs_without_an_installed_script() -> None:
    command = [sys.executable, "-m", "ibp_triton.harness.cli", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "120"})
    assert all(name in out.stdout for name in ("run", "evaluate", "report"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ibp_triton.harness"):
            rest = node.module.removeprefix("ibp_triton.harness").strip(".")
            found |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
    return found


def test_imports_run_one_way() -> None:
    """cli → stored → trials → launch → executors → train → the rest, and no cycle anywhere."""
    graph: dict[str, set[str]] = {}
    for path in HARNESS.rglob("*.py"):
        name = path.relative_to(HARNESS).parts[0].removesuffix(".py")
        graph[name] = graph.get(name, set()) | (imports(path) - {name})
    asked = ("cli", "stored", "launch", "train")
    users = {name: {other for other, used in graph.items() if name in used} for name in asked}
    above = {"cli": set(), "stored": {"cli"}, "launch": {"cli", "stored", "trials"}}
    assert users == {**above, "train": {"launch", "executors"}}
    placed: set[str] = set()
    while graph:
        free = {name for name, used in graph.items() if used <= placed}
        assert free, f"these import each other: {sorted(graph)}"
        placed |= free
        graph = {name: used for name, used in graph.items() if name not in free}


def test_the_command_starts_without_compilers() -> None:
    """They take seconds to import, and most commands compile nothing."""
    asked = "import sys, ibp_triton.harness.cli; print([n for n in sys.modules if n.split('.')[:2] in WORDS])"
    words = [["torch", "_dynamo"], ["torch", "_inductor"], ["matplotlib"]]
    run = subprocess.run(
        [sys.executable, "-c", f"WORDS = {words}; {asked}"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("times", "told"), [(11.2, True), (1.1, False)])
def test_a_precision_that_this_processor_emulates_is_told_with_its_cure(
    tree: Tree,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: float,
    told: bool,
) -> None:
    monkeypatch.setattr(
        "ibp_triton.harness.estimates.example_seconds", lambda run: times if run.training.precision == "bf16" else 1.0
    )
    tree["training"]["precision"] = "bf16"
    for more in (["--dry-run"], ["--only", "method=bp"]):
        assert ibp_triton(monkeypatch, "run", str(write(tree)), *more) == 0
        text = "bf16 takes 11.2 times as long as fp32 on this processor: --set training.precision=fp32"
        assert (text in " ".join(capsys.readouterr().out.split())) == told


def test_times_are_estimated_on_one_thread_as_runs_take_them(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, gradient = [], ibp.BP.__call__
    monkeypatch.setattr(ibp.BP, "__call__", lambda *a: seen.append(torch.get_num_threads()) or gradient(*a))
    estimates._time_bp.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert ibp_triton(monkeypatch, "run", str(write(tree)), "--dry-run") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_numbers_beyond_all_measure_cost_neither_memory_nor_a_traceback(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A step is as large as the examples are many, in estimates as in training."""
    seen: list[int] = []
    counted = ibp.Network.multiply_adds
    monkeypatch.setattr(
        ibp.Network, "multiply_adds", lambda self, shape, *more: seen.append(shape[0]) or counted(self, shape, *more)
    )
    timed = estimates._time_bp.__wrapped__
    monkeypatch.setattr(
        estimates, "_time_bp", lambda n, p, batch, *more: seen.append(batch) or timed(n, p, batch, *more)
    )
    monkeypatch.setattr(estimates, "_KNOWN", {})
    estimates._work.cache_clear()
    tree |= {"output": str(tmp_path / "out"), "methods": {"bp": None}, "seeds": [0]}
    tree["training"] = {**tree["training"], "batch_size": 10**5}
    config = write(tree)
    for more in (["--dry-run", "--set", f"training.epochs={10**20}"], []):
        assert ibp_triton(monkeypatch, "run", str(config), *more) == 0
    assert seen
    assert max(seen) <= 64
    assert "11574074 days" in capsys.readouterr().out
