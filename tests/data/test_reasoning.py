"""Questions that reasoning-gym makes: the same rows everywhere, test rows apart from training rows, mistakes in one line."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedsb.app.assembly import corpus_of, parts_of, peopled
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.data import load_corpus, read_raw
from fedsb.data.reasoning import PACKAGE, TASKS, TEST, TRAIN, TRIES

pytestmark = pytest.mark.skipif(find_spec(PACKAGE) is None, reason="reasoning-gym is not installed")
COLUMNS = ["prompt", "response", "answer", "task"]


@pytest.fixture
def gym(data_config):
    return lambda *tasks, **changes: data_config(kind="reasoning_gym", task="causal_lm", label=None, tasks=tasks, **changes)


def rows_of(table):
    return list(zip(*(table[name] for name in COLUMNS), strict=True))


def test_every_task_has_questions_with_short_answers_and_its_rows_are_drawn_from_no_global_generator(gym):
    before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state())  # noqa: NPY002
    raw = read_raw(gym(*TASKS, task_rows=6, task_test_rows=4))
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    for table, each in ((raw.train, 6), (raw.test, 4)):
        assert list(table["task"]) == [task for task in TASKS for _ in range(each)]
        for prompt, response, answer, _ in rows_of(table):
            assert prompt == prompt.strip() != ""
            assert response == answer == answer.strip() != ""
            assert "\n" not in answer
            assert len(answer) < 120
    assert [text == f"{p}\n{r}" for p, r, text in zip(raw.train["prompt"], raw.train["response"], raw.train["text"], strict=True)]


def test_the_answers_are_right(gym):
    raw = read_raw(gym("chain_sum", "gcd", "spell_backward", task_rows=20, task_test_rows=20))
    for table in (raw.train, raw.test):
        for prompt, _, answer, task in rows_of(table):
            if task == "chain_sum":
                said = prompt.removeprefix("State the final answer to the following arithmetic problem: ").removesuffix(" =")
                assert sum(int(sign + term) for sign, term in zip(*signs_and_terms(said), strict=True)) == int(answer)
            if task == "gcd":
                numbers = [int(word.strip(",.")) for word in prompt.split() if word.strip(",.").isdigit()]
                assert np.gcd.reduce(numbers) == int(answer)
            if task == "spell_backward":
                assert answer[::-1] in prompt


def signs_and_terms(said):
    words = ["+", *said.split()]
    return words[::2], words[1::2]


def test_rows_follow_from_their_seeds_alone(gym):
    """More rows begin with the same ones, and neither the other tasks nor their order matter."""
    few = read_raw(gym("leg_counting", task_rows=5, task_test_rows=5))
    many = read_raw(gym("gcd", "leg_counting", task_rows=9, task_test_rows=5))
    assert rows_of(many.train)[9:14] == rows_of(few.train)
    assert rows_of(many.test)[5:] == rows_of(few.test)


def test_the_ranges_of_seeds_are_disjoint_at_any_size_that_is_allowed():
    largest = 10**6 * TRIES
    assert all(first + largest <= second for first, second in pairwise(sorted([TRAIN, TEST])))
    with pytest.raises(UserError, match=r"data.task_rows=1000001 is out of range"):
        load(["data=reasoning_gym", "data.task_rows=1000001"])


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "syllogism"])
def test_no_training_row_asks_what_a_test_row_does(gym, task):
    """Also where disjoint seeds alone would let questions meet: sums of two digits are a few hundred."""
    narrow = {"chain_sum": {"chain_sum": {"max_terms": 2, "max_digits": 1}}}.get(task, {})
    raw = read_raw(gym(task, task_rows=300, task_test_rows=40, task_options=narrow))
    asked = list(raw.test["prompt"])
    assert (len(raw.train), len(asked), len(set(asked))) == (300, 40, 40)
    assert set(raw.train["prompt"]).isdisjoint(asked)


@pytest.mark.slow
def test_other_processes_make_the_same_rows(gym):
    """The order of a set of texts differs between processes: their hashes are salted."""
    code = (
        "import hashlib; from dataclasses import replace; from fedsb.config.compose import load; from fedsb.data import read_raw\n"
        "from fedsb.data.reasoning import TASKS\n"
        "raw = read_raw(replace(load(['data=reasoning_gym']).data, tasks=tuple(TASKS), task_rows=8, task_test_rows=3))\n"
        "print(hashlib.sha256(repr([list(t[c]) for t in (raw.train, raw.test) for c in t.column_names]).encode()).hexdigest())"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": salt}, check=True, capture_output=True).stdout
        for salt in ("1", "2")
    }
    assert len(seen) == 1


def test_the_package_is_left_as_if_it_had_not_been_imported(gym):
    """Its own beginning, which imports all of its tasks, is not ours to have skipped for others."""
    read_raw(gym("chain_sum", task_rows=2, task_test_rows=2))
    assert not [name for name in sys.modules if name.partition(".")[0] == PACKAGE]


def test_one_task_a_client():
    config = peopled(
        load(
            [
                *("data=reasoning_gym", "data.tasks=[gcd,lcm,chain_sum]", "data.task_rows=20", "data.task_test_rows=5"),
                *("federation.partition.kind=natural", "federation.partition.column=task"),
            ]
        )
    )
    assert config.federation.names == ("chain_sum", "gcd", "lcm")
    corpus, parts = corpus_of(config), parts_of(config)
    assert {client: {corpus.train.owners[i] for i in rows} for client, rows in parts.items()} == {name: {name} for name in parts}
    assert {len(rows) for rows in parts.values()} == {20}
    assert len(corpus.test) == 15


OPTIONS = "+data.task_options.chain_sum"
MISTAKES = {
    "data.tasks=[chain_sums]": r"unknown task in data.tasks 'chain_sums' \(did you mean 'chain_sum'\?\); choose from aiw, ",
    "data.tasks=[]": r"data.tasks=\[\] must name tasks, each once; choose from aiw, ",
    "data.tasks=[gcd,gcd]": r"data.tasks=\[gcd, gcd\] must name tasks, each once",
    "+data.task_options.gcd={}": r"data.task_options.gcd: data.tasks=\[chain_sum, leg_counting\] does not name that task",
    f"{OPTIONS}={{terms: 2}}": r"data.task_options.chain_sum is not usable \(.*'terms'\); its options are min_terms, max_terms, ",
    f"{OPTIONS}={{max_terms: 0}}": r"data.task_options.chain_sum is not usable \(max_terms must be >= min_terms\)",
    f"{OPTIONS}={{min_terms: 1, max_terms: 1, max_digits: 1}}": r"'chain_sum' has too few different questions for data.task_test_rows=100",
    "data.path=rows.csv": r"data.path=rows.csv has no effect with data=reasoning_gym; add data=files",
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_are_one_line(said):
    with pytest.raises(UserError, match=MISTAKES[said]) as caught:
        load_corpus(load(["data=reasoning_gym", said]).data, 0)
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_how_to_install_it(gym, monkeypatch):
    monkeypatch.setattr("fedsb.data.reasoning.PACKAGE", "no_such_gym")
    with pytest.raises(
        UserError, match=r"needs the package reasoning-gym, which is not installed: pip install --no-deps reasoning-gym==[\d.]+$"
    ):
        read_raw(gym("chain_sum"))
