"""A job, and its folder, are called by what varies, and no two alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedsb.config.overrides import readable
from fedsb.sweep.jobs import LONGEST, label_jobs
from fedsb.sweep.manifest import grid_of


def test_a_job_is_named_by_what_varies() -> None:
    jobs = [["a=1", "b=x", "c=7"], ["a=1", "b=y", "c=7"], ["a=1", "b=x", "c=8"]]
    assert [job.label for job in label_jobs(jobs)] == ["b=x c=7", "b=y c=7", "b=x c=8"]
    assert [job.name for job in label_jobs(jobs)] == ["b=x+c=7", "b=y+c=7", "b=x+c=8"]
    assert label_jobs([["a=1"]])[0].label == "the only job"
    assert label_jobs([["a=1"]])[0].name == "job"
    assert grid_of(label_jobs(jobs)) == {"b": ["x", "y"], "c": ["7", "8"]}


def test_a_grid_need_not_have_every_key_in_every_job() -> None:
    jobs = label_jobs([["method=a", "train.lr=1"], ["method=b"]])
    assert [job.name for job in jobs] == ["method=a+lr=1", "method=b"]
    assert grid_of(jobs) == {"method": ["a", "b"], "train.lr": ["1"]}


def test_keys_are_shortened_where_that_leaves_them_apart() -> None:
    jobs = label_jobs(
        [["privacy.lr=1", "train.lr=2", "+federation.num_clients=5"], ["privacy.lr=2", "train.lr=1", "+federation.num_clients=6"]]
    )
    assert jobs[0].name == "privacy.lr=1+train.lr=2+num_clients=5"


def test_values_that_a_file_system_or_a_shell_would_take_otherwise_are_spelled_out() -> None:
    jobs = label_jobs([["data.path='/a b/c.csv'", "x=-1"], ["data.path='/a b/d,e.csv'", "x=1"], ["data.path='/a-b/c.csv'", "x=-1"]])
    assert [job.name for job in jobs] == ["path=a-b-c.csv+x=-1", "path=a-b-d-e.csv+x=1", "path=a-b-c.csv+x=-1+2"]


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=300), min_size=1, max_size=6))
def test_folders_are_apart_short_and_of_plain_letters(values: list[str]) -> None:
    names = [job.name for job in label_jobs([[f"key={value}"] for value in values])]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= LONGEST + 3
        assert all(c.isascii() and (c.isalnum() or c in "=+-_.@") for c in name)
        assert readable(f"resume=sweep/{name}")
