"""What counts as the answer in a response, and whether it is the right one: one table of rules.

A rule reads an answer out of a text, the reference's and the model's alike, as a key; two answers are the same where their keys are. What
it finds no answer in is a parse failure, and wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from fedsb.core.errors import UserError

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"  # 1,234 is one number, and 1,2,3 are three
_MINUS = "[-−]"
# A minus behind a word, a digit or a bracket is that of a difference: 10-5 ends with 5.
NUMBER = re.compile(rf"(?:(?<![\w)\]]){_MINUS})?\$?(?:(?<=\$){_MINUS})?(?:{_WHOLE}(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)")
GSM8K = re.compile(r"#### (-?[0-9.,]+)")
AROUND = " \t\r\n.!\"'`*“”\u2018\u2019"
Read = Callable[[str], str | None]


def number_key(text: str) -> str | None:
    """Return a number without commas, dollar and percent signs and a trailing period, so that 18, 18.0 and $18.00 are one; None if none."""
    bare = text.strip().rstrip("%.")
    return _canonical(bare.replace("$", "").replace("−", "-")) if NUMBER.fullmatch(bare) else None


def _canonical(digits: str) -> str | None:
    try:
        value = Decimal(digits.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    text = format(value if value else Decimal(0), "f")  # of every length: Decimal.normalize rounds to 28 digits
    return text.rstrip("0").rstrip(".") if "." in text else text


def last_number(text: str) -> str | None:
    """Return the last number of a text, as :func:`number_key` has it.

    Commas stand between thousands; a dollar sign, a percent sign and a full stop behind it do not count. Fractions, powers and numbers in
    words are not read: 1/2 ends with 2. (lm-eval's ``flexible-extract`` of gsm8k takes the last number too, but compares texts.)
    """
    found = NUMBER.findall(text)
    return number_key(found[-1]) if found else None


def gsm8k(text: str) -> str | None:
    """Return the number behind the first ``#### `` (Cobbe et al. 2021, ``extract_answer`` in openai/grade-school-math).

    The pattern is theirs, and so is that nothing else counts. They compare texts without commas; here 18 and 18.00 are the same.
    """
    found = GSM8K.search(text)
    return None if found is None else _canonical(found[1]) or found[1].replace(",", "")


def whole(text: str) -> str | None:
    """Return a whole response: in lower case, in Unicode's compatible form, blanks joined, without marks and quotes around it."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(AROUND) or folded or None


def answer_key(reference: str) -> Read:
    """Return how to read an answer that has the form of a reference: the last number where that is a number, else the whole response."""
    return whole if number_key(reference) is None else last_number


@dataclass(frozen=True)
class Scorer:
    """A rule.

    Attributes:
        expected: reads the right answer out of a reference; None where there is none.
        given: reads the answer out of a response to the question of that reference; None is a parse failure.
    """

    expected: Read
    given: Callable[[str, str], str | None]


def _alike(read: Read) -> Scorer:
    return Scorer(read, lambda response, _: read(response))


def _regex(pattern: str) -> Scorer:
    """Return the rule of a regular expression: its first match, of that the first group if it has one.

    Numbers are compared as numbers, and else as :func:`whole` does. A reference that the expression does not match is an answer by itself.
    """
    compiled = re.compile(pattern)

    def found(text: str) -> str | None:
        match = compiled.search(text)
        said = None if match is None else next((group for group in match.groups() if group is not None), match[0])
        return None if said is None else number_key(said) or whole(said)

    return Scorer(lambda text: found(text) or number_key(text) or whole(text), lambda response, _: found(response))


# By the name that eval.scorer gives; each is made from eval.pattern, which one of them has a use for.
SCORERS: dict[str, Callable[[str], Scorer]] = {
    "gsm8k": lambda _: _alike(gsm8k),
    "last_number": lambda _: _alike(last_number),
    "whole": lambda _: _alike(whole),
    "answer": lambda _: Scorer(lambda text: answer_key(text)(text), lambda response, reference: answer_key(reference)(response)),
    "regex": _regex,
}


def scorer_for(references: Sequence[str]) -> str:
    """Return the rule of ``eval.scorer=auto``: ``gsm8k`` where each reference ends as that data set's do, else ``answer``."""
    return "gsm8k" if references and all(GSM8K.search(text) for text in references) else "answer"


@dataclass(frozen=True)
class Answer:
    """A response and what was made of it.

    Attributes:
        response: as generated.
        given: its answer; None where the rule finds none.
        expected: the right one.
    """

    response: str
    given: str | None
    expected: str

    @property
    def right(self) -> bool:
        """Whether the two are the same."""
        return self.given == self.expected


def expected_answers(scorer: str, pattern: str | None, references: Sequence[str], where: str = "the test part") -> list[str]:
    """Return the right answers; ``where`` the references stand is named where one has none.

    Raises:
        UserError: a reference has none by this rule.
    """
    rule = SCORERS[scorer](pattern or "")
    found = [rule.expected(text) for text in references]
    lost = next((text for text, key in zip(references, found, strict=True) if key is None), None)
    if lost is not None:
        shown = " ".join(lost.split())[-60:]
        others = ", ".join(name for name in SCORERS if name != scorer)
        raise UserError(f"eval.scorer={scorer} finds no answer in a response of {where} ('{shown}'); choose from {others}")
    return [key for key in found if key is not None]


def judge(scorer: str, pattern: str | None, responses: Sequence[str], references: Sequence[str]) -> list[Answer]:
    """Hold responses against their references.

    Raises:
        UserError: see :func:`expected_answers`.
    """
    rule = SCORERS[scorer](pattern or "")
    keys = expected_answers(scorer, pattern, references)
    given = [rule.given(response, reference) for response, reference in zip(responses, references, strict=True)]
    return [Answer(*row) for row in zip(responses, given, keys, strict=True)]


def chance_of(keys: Sequence[str]) -> float:
    """Return what always giving the commonest right answer would score on these examples."""
    return max(Counter(keys).values()) / len(keys)


def answer_items(answers: Sequence[Answer]) -> dict[str, list[bool]]:
    """Return of each response whether it is right, and whether the rule finds no answer in it."""
    return {"exact_match": [answer.right for answer in answers], "parse_failures": [answer.given is None for answer in answers]}


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the share of right answers, of responses without an answer, the chance level, and the number of examples."""
    count = len(answers)
    return {
        "exact_match": sum(answer.right for answer in answers) / count,
        "parse_failures": sum(answer.given is None for answer in answers) / count,
        "chance": chance_of([answer.expected for answer in answers]),
        "examples": float(count),
    }
