"""What counts as the answer in a response: each rule against a table of cases."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.config.checks import CHOICES
from fedsb.core.errors import UserError
from fedsb.tasks.answers import SCORERS, answer_metrics, gsm8k, judge, last_number, number_key, scorer_for, whole

LAST = {
    "The answer is 18.": "18",
    "18": "18",
    "18.0": "18",
    "so it costs $1,234.50": "1234.5",
    "$18.00 a day": "18",
    "-5": "-5",
    "= -5.": "-5",
    "minus −5": "-5",
    "-$5": "-5",
    "$-5": "-5",
    "10-5": "5",
    "(3)-4": "4",
    "50%": "50",
    "12.5 %": "12.5",
    ".5": "0.5",
    "0.50": "0.5",
    "-0": "0",
    "1,2,3": "3",
    "1,234,567": "1234567",
    "1,2345": "2345",
    "It is 3. Then 4 more: 7 apples.": "7",
    "1.2.3": "3",
    "1/2": "2",
    "007": "7",
    "2 + 2 = 4, as 1,000 is not": "1000",
    "x2": "2",
    "**42**": "42",
    "\\boxed{42}": "42",
    "100000000000000000000000000001": "100000000000000000000000000001",
    "eighteen": None,
    "": None,
    "...": None,
    "٣": None,  # digits of another script
}
GSM = {
    "He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7": "7",
    "#### 1,234": "1234",
    "#### -12": "-12",
    "#### 18.": "18",
    "#### 18.00": "18",
    "#### 7\n\nQ: another one\n#### 9": "7",
    "####7": None,
    "#### $7": None,
    "The answer is 7.": None,
    "": None,
}
WHOLE = {
    "Yes": "yes",
    " yes. ": "yes",
    "**Yes!**": "yes",
    '"left to\n right"': "left to right",
    "STRASSE": "strasse",
    "Straße": "strasse",
    "\uff11\uff12": "12",
    "The answer is yes": "the answer is yes",
    "...": "...",
    " \n": None,
    "": None,
}


@pytest.mark.parametrize(("read", "table"), [(last_number, LAST), (gsm8k, GSM), (whole, WHOLE)], ids=["last_number", "gsm8k", "whole"])
def test_rules_read_what_their_tables_say(read, table):
    assert {text: read(text) for text in table} == table


# scorer, pattern, response, reference, whether it is right; None where the response has no answer
CASES = [
    ("gsm8k", None, "6 * 3 = 18\n#### 18", "so <<6*3=18>>18\n#### 18", True),
    ("gsm8k", None, "The answer is 18", "#### 18", None),
    ("gsm8k", None, "#### 18.0", "#### 18", True),
    ("last_number", None, "It is 1,000 dollars.", "#### 1000", True),
    ("last_number", None, "none at all", "4", None),
    ("last_number", None, "4, no: 5", "4", False),
    ("answer", None, "The sum of 3 and 4 is 7.", "7", True),
    ("answer", None, "7 (of 9)", "7", False),
    ("answer", None, "Yes.", "yes", True),
    ("answer", None, "I say yes", "yes", False),
    ("answer", None, "", "yes", None),
    ("answer", None, "seven", "7", None),
    ("answer", None, "1E5", "1e5", True),  # a number to nobody but a programmer: a word
    ("whole", None, "A  B", "a b", True),
    ("whole", None, "7.0", "7", False),
    ("regex", r"answer is \(?([A-D])", "So the answer is (B).", "B", True),
    ("regex", r"answer is \(?([A-D])", "So the answer is (B).", "The answer is C", False),
    ("regex", r"answer is \(?([A-D])", "B", "B", None),
    ("regex", r"= (\S+)", "x = 1,000.0", "y = 1000", True),
    ("regex", r"[a-d]$|^[a-d]", "b or c", "b", True),  # the first match, and all of it
    ("regex", r"(?:x(\d))|(?:y(\d))", "y3", "3", True),  # the group that took part
]


@pytest.mark.parametrize(("scorer", "pattern", "response", "reference", "right"), CASES)
def test_responses_are_held_against_references(scorer, pattern, response, reference, right):
    (answer,) = judge(scorer, pattern, [response], [reference])
    assert (answer.given is None) == (right is None)
    assert answer.right is bool(right)


@given(st.decimals(-(10**6), 10**6, places=3), st.sampled_from(["{:f}", "{:,f}", "it is {:f}.", "${:f}", "{:,f}%", "is {:.5f}"]))
def test_numbers_are_compared_by_value_however_they_are_written(value: Decimal, form: str) -> None:
    written = form.format(value)
    found = last_number(written)
    assert found is not None
    assert Fraction(found) == Fraction(value)
    assert found == number_key(str(value))


def test_scores_stand_beside_their_failures_their_chance_and_their_number():
    said = ["7", "it is 7", "eight", "8.0", ""]
    found = answer_metrics(judge("last_number", None, said, ["7", "8", "8", "8", "7"]))
    assert found == {"exact_match": 2 / 5, "parse_failures": 2 / 5, "chance": 3 / 5, "examples": 5.0}


def test_the_rule_follows_from_the_references_where_none_is_named():
    assert scorer_for(["a\n#### 7", "#### 8"]) == "gsm8k"
    assert scorer_for(["a\n#### 7", "8"]) == "answer"


def test_a_reference_without_an_answer_is_one_line():
    with pytest.raises(UserError, match=r"^eval.scorer=gsm8k finds no answer in a response of the test part \('so it is 7'\); choose "):
        judge("gsm8k", None, ["#### 7"], ["so it\nis 7"])


def test_the_configuration_names_the_table():
    assert set(CHOICES["eval.scorer"]) == {"auto", *SCORERS}
