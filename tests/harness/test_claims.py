"""The paper's claims beside kept results."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ibp_triton.errors import ConfigError
from ibp_triton.harness import stats
from ibp_triton.harness.cli import app
from ibp_triton.harness.report import Findings, experiments_in
from ibp_triton.harness.report.claims import Claim, claims, judged
from ibp_triton.harness.report.paper import TABLES
from ibp_triton.harness.stored import _stored

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize(
    ("claim", "p", "verdict"),
    [
        (Claim(""), None, "no runs yet"),
        (Claim("", "", True), None, "holds"),
        (Claim("", "", False), None, "fails"),
        (Claim("", "", False, doubtful=True), None, "open"),
        (Claim("", "", True, 0.0), 0.01, "holds"),
        (Claim("", "", True, 0.0), 0.2, "open"),
        (Claim("", "", False, 0.0), 0.2, "open"),
        (Claim("", "", False, 0.0), 0.01, "fails"),
        (Claim("", "", True, 0.0, tie=True), 0.2, "holds"),
        (Claim("", "", False, 0.0, tie=True), 0.2, "open"),
        (Claim("", "", True, 0.0, tie=True), 0.01, "fails"),
    ],
)
def test_a_verdict_says_no_more_than_chance_allows(claim: Claim, p: float | None, verdict: str) -> None:
    assert claim.verdict(p) == verdict


def test_all_p_values_of_the_page_are_one_family() -> None:
    found = [Claim("a", "x", True, 0.02), Claim("b", "y", True, 0.03), Claim("c", "z", True), Claim("d")]
    table, summary = judged(found)
    assert [line[1:] for line in table.cells] == [
        ["x; p = 0.04", "holds"],
        ["y; p = 0.04", "holds"],
        ["z", "holds"],
        ["–", "no runs yet"],
    ]
    assert judged([*found, Claim("e", "", True, 0.025)])[0].cells[0][2] == "open"
    assert summary == "Of 4 claims 3 hold, 1 have no runs yet."


def test_a_p_value_below_every_float_is_not_zero() -> None:
    assert judged([Claim("a", "x", False, 0.0)])[0].cells == [["a", "x; p < 1e-300", "fails"]]


def test_without_results_every_statement_is_there_and_says_so() -> None:
    found = list(claims({}))
    table, _ = judged(found)
    assert {line[2] for line in table.cells} == {"no runs yet"}
    texts = [claim.text for claim in found]
    for name, printed in (("MNIST", TABLES["table1_mnist"]), ("CIFAR-10", TABLES["table1_cifar10"])):
        differ = sum(one.mean != printed["bp"].mean for one in printed.values())
        assert sum(text.startswith(f"{name}: ") for text in texts) == 2 * (len(printed) - 1) + differ + 2
    assert "MNIST: an epoch of Tangent BP takes 4.95 times BP's" in texts
    assert "CIFAR-10: Tangent BP improves on BP by 7.50 points (22 %)" in texts
    assert "Figure 4: Prediction IBP improves on BP by 43 % with 1000 digits, not augmented" in texts
    assert sum("best β falls" in text for text in texts) == 2


def test_an_interval_of_a_difference_is_paired() -> None:
    first = torch.rand(2, 1, 400, generator=torch.Generator().manual_seed(0)) > 0.3
    second = first.clone()
    second[:, :, :40] = True
    low, high = stats.difference_band(first, second)
    exact = 100 * float((second & ~first).float().mean())
    assert low[0] < exact < high[0]
    assert high[0] - low[0] < 6, "unpaired it would be wider than 8"
    assert stats.difference_band(first, first)[1][0] == 0


def test_kept_claims_are_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (RESULTS / "claims.md").read_text(encoding="utf-8")
    for path in RESULTS.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(RESULTS.parent)  # an experiment names the folder of its runs from there
    done = CliRunner().invoke(app, ["claims", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == text
    summary = text.split("\n\n")[1]
    assert summary in (RESULTS / "README.md").read_text(encoding="utf-8").split("\n## ")[0].replace("\n", " ")


def test_a_method_that_the_table_lacks_is_taken_from_its_float32_twin_beside_the_bp_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(RESULTS.parent)
    with ExitStack() as stack:
        kept = experiments_in(RESULTS, lambda folder: Findings(*_stored(folder, stack)))
        whole, part = kept["table1_mnist"], kept["prediction_ibp_mnist"]
        assert {row.key for row in part.chosen} == {"bp", "prediction_ibp"}
        alone, few, both = (
            {claim.text: claim.ours for claim in claims(found)}
            for found in (
                {"table1_mnist": whole},
                {"table1_mnist": part},
                {"table1_mnist": part, "table1_mnist_fp32": whole},
            )
        )
    for text, ours in both.items():
        taken = text.startswith("MNIST") and few[text] in ("", "2 of 7 methods have runs")
        assert ours == (alone if taken else few)[text], text
    assert sum(not ours for ours in few.values()) > sum(not ours for ours in both.values()) + 10


def test_a_folder_without_experiments_is_refused(tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(app, ["claims", str(tmp_path)]).exception, ConfigError)
