"""Five models of the zoo that need no other package; all of them: `make zoo`."""

import pytest

from tests.zoo.judging import judge
from tests.zoo.models import OWN
from tests.zoo.refused import REFUSALS
from tests.zoo.table import PLACE, page

FIVE = ("SplineNet", "Experts", "SpectralConv", "WeightStandardised", "StateSpace")


@pytest.mark.parametrize("case", [case for case in OWN if case.name in FIVE], ids=lambda case: case.name)
def test_a_model_agrees_with_the_oracle_and_the_oracle_with_the_objective(case):
    judge(case)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_what_is_refused_says_so(refusal):
    assert len(refusal.message()) > 60


def test_the_page_of_models_is_what_the_tables_say():
    assert PLACE.read_text(encoding="utf-8") == page(), "python -m tests.zoo.table writes docs/models.md anew"
