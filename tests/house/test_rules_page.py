"""The page of rules is what the code says."""

from ibp_triton.backends.torch import rules
from tests.house.rules_page import PLACE, page


def test_the_page_of_rules_is_what_the_table_and_the_docstrings_say() -> None:
    assert PLACE.read_text(encoding="utf-8") == page(), "python -m tests.house.rules_page writes docs/rules.md anew"


def test_every_rule_says_what_it_does() -> None:
    rows = page().partition("|---|")[2].splitlines()[1:]
    assert len(rows) == len(rules._FUNCTIONS)
    for row in rows:
        assert "||" not in row.replace("\\|", ""), row
        assert "function" not in row.split(" | ")[1].replace("`F.", ""), row
