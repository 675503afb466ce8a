"""The model of a launch's time: the review's table from the review's kernels, and what the model makes of today's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ibp_triton.harness import predictions
from ibp_triton.kernels import tiles
from ibp_triton.kernels.combine import PartSums
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.workbench import model, sass
from ibp_triton.kernels.workbench.model import CARDS, HIGH, LOW, Counts

H100 = CARDS["H100"]
# Loss IBP's step on the MNIST network, captured, on an H100: µs as the review of the kernels states them.
REVIEWED = {
    "float32 32": (250, 440), "float32 256": (1100, 1600), "float32 1024": (4000, 5900),
    "tf32 32": (140, 220), "tf32 256": (650, 1050), "tf32 1024": (2400, 3900),
    "bfloat16 32": (120, 180), "bfloat16 256": (400, 600), "bfloat16 1024": (1400, 2200),
}  # fmt: skip


def reviewed(row):
    """The step's launches with what the compiler made of them when the review was written, as counted then."""
    found = json.loads((Path(__file__).parent / "review.json").read_text())[row]
    return [Counts(*numbers) for numbers in found["launches"]] + [model.torch_operator(n) for n in found["others"]]


@pytest.mark.parametrize("row", REVIEWED)
def test_the_reviews_table_is_reproduced(row):
    """Within a quarter at both ends, from the kernels it saw; the constants are its own or named in `model`."""
    found = model.microseconds(reviewed(row), H100, row.split()[0])
    assert found == pytest.approx(REVIEWED[row], rel=0.25)


def test_the_reviews_two_kernels_are_reproduced():
    """The first convolution's reverse at batch 1024: what it issues."""
    for row, expected in (("float32 1024", 835), ("tf32 1024", 350)):
        (reverse,) = (c for c in reviewed(row) if c.name == "contract" and c.programs in (12544, 25088))
        found = model.bounds(reverse, H100, row.split()[0])
        assert found.issue / model.USED * 1e6 == pytest.approx(expected, rel=0.01)
        assert found.name == "issue"


LAUNCH = Counts("contract", 1320, 4, 4, 1000, 10, 10**6, 10**5, 10**6)


def test_each_bound_binds_where_it_is_the_largest():
    slow = {"issue": {"issued": 10**6}, "cache": {"moved": 10**9}, "memory": {"unique": 10**9}}
    slow |= {"matrix": {"flops": 10**11}, "steps": {"steps": 1000}}
    for name, change in slow.items():
        found = model.bounds(replace(LAUNCH, **change), H100, "float32")
        assert found.name == name
        assert found.seconds(HIGH) > found.seconds(LOW) > 1e-5
    tiny = Counts("gate", 1, 4, 4, 10, 1, 10, 10, 0)
    assert model.bounds(tiny, H100, "tf32").name == "launch"


def test_few_warps_leave_slots_empty_and_waves_wait():
    full = model.bounds(LAUNCH, H100, "float32")  # ten programs a multiprocessor, four at a time
    assert (full.warps, full.steps) == (4, 30)
    lonely = model.bounds(replace(LAUNCH, held=1), H100, "float32")
    assert (lonely.warps, lonely.steps) == (1, 100)
    assert lonely.issue == full.issue
    times = [model.bounds(replace(LAUNCH, issued=10**6, held=n), H100, "float32").seconds(LOW) for n in (1, 4)]
    assert times[0] / times[1] == pytest.approx(3 * model.USED, rel=0.01)


def test_loops_are_found_and_counted():
    text = [".L_x_0:", "/*0000*/ MOV R1, R2 ;", ".L_x_1:", "/*0010*/ FFMA R1, R2, R3, R4 ;",
            "/*0020*/ @P0 BRA `(.L_x_1) ;", "/*0030*/ @!P0 BRA `(.L_x_0) ;", ".L_x_2:", "/*0040*/ IADD R1, R1, R2 ;",
            "/*0050*/ @P1 BRA `(.L_x_2) ;", "/*0060*/ EXIT ;", ".L_x_3:", "/*0070*/ BRA `(.L_x_3) ;",
            "/*0080*/ NOP ;"]  # fmt: skip
    code = sass.read(text)
    assert code == sass.Code(7, (4, 2))
    assert code.issued([3]) == 7 + 4 * 2
    assert code.issued([3, 5]) == 7 + 4 * 2 + 2 * 4
    assert code.issued([1, 1, 9]) == 7


def test_the_predictions_of_the_page_are_the_models():
    """Batch 32 on an H100 anew, in each dtype; the page has every card, dtype and batch."""
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"| network | method | dtype | batch | {' | '.join(CARDS)} |" in page
    for dtype in predictions.KINDS:
        for batch in predictions.BATCHES:
            (line,) = (x for x in page.splitlines() if x.startswith(f"| mnist | loss_ibp | {dtype} | {batch} | "))
            assert line.count("–") == len(CARDS)
            if batch == 32:
                (found,) = predictions.predicted(["H100"], [dtype], [batch])
                assert line.split(" | ")[4] == found.text
                assert dtype != "tf32" or found.low <= 110
    assert predictions.lines([found])[0][:4] == ["mnist", "loss_ibp", dtype, "32"]


def test_a_program_of_several_sums_goes_through_its_own_alone():
    parts = [(torch.zeros(n, 1, width), torch.zeros(width)) for n, width in ((156, 64), (32, 640))]
    with tiles.on_chip("sm_90"), recording(execute=False) as launches:
        sums = PartSums()
        for partial, out in parts:
            sums.add(partial, out, None, 1.0)
        sums.now()
    (launch,) = launches
    assert launch.grid == (11, 1, 1)
    assert model.trips(launch) == [2]  # one program of 5 rounds, ten of one: the mean, rounded up
    assert model.counts(launch, "sm_90").steps == 5


def test_an_unknown_card_is_refused():
    with pytest.raises(ValueError, match="unknown card H1; choose from H100"):
        predictions.predicted(["H1"])
