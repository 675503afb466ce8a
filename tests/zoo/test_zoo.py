"""Other people's models, and ours, against the oracle: `make zoo`."""

import warnings

import pytest

from tests.zoo.judging import judge
from tests.zoo.models import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_model_of_the_zoo(case):
    if case.family != "own":
        pytest.importorskip(case.family, exc_type=ImportError)
    with warnings.catch_warnings():
        if case.family != "own":
            warnings.simplefilter("ignore")  # of other people's packages about themselves
        judge(case)
