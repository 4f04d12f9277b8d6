"""Overrides as people write them: read as they are meant where that is plain, and one line with the remedy where it is not."""

from __future__ import annotations

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hypothesis import assume, given
from hypothesis import strategies as st

from fedsb.adapters import SPECS
from fedsb.config.compose import load
from fedsb.config.overrides import check_single, readable, sweep_jobs
from fedsb.core.errors import UserError
from fedsb.core.folders import conf_dir


def meant(text: str) -> object:
    """Return the value that Hydra reads."""
    value = OverridesParser.create().parse_override(readable(text)).value()
    return [item.text if isinstance(item, QuotedString) else item for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("value", [
    "/a/café.csv", "/a/run=3/x.csv", "/a/my (copy).csv", "/a/{x}.csv", "/a/[1].csv", "/a#b;c&d!.csv", "a(1).csv", "/it's.csv", "größe",
    "a=b", "~/x.csv", "C:\\daten\\größe.csv", "日本語", "a\tb\nc#",
])  # fmt: skip
def test_a_value_that_can_mean_one_thing_alone_is_taken_so(value: str) -> None:
    assert meant(f"data.path={value}") == value


PATHS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters=",'\"\\$"), min_size=1, max_size=12)


@given(PATHS)
def test_any_path_comes_through(name: str) -> None:
    path = f"/{name}.csv"
    assume("#" in path or not path.isascii())  # others Hydra may read in its own way
    assert meant(f"data.path={path}") == path


def test_elements_of_a_list_or_a_sweep_are_taken_one_by_one() -> None:
    assert meant("data.text=[größe,b]") == ["größe", "b"]
    assert sweep_jobs(["data.path=/a/é.csv,/b.csv", "seed=1"]) == [["data.path='/a/é.csv'", "seed=1"], ["data.path=/b.csv", "seed=1"]]


@pytest.mark.parametrize(
    "text", ["rank=8", "method=fed_sb,head_only", "data.text=[a,b]", "+x={a:1}", "~seed", "a='b c'", "rank=range(1,3)"]
)
def test_what_hydra_can_read_stays_as_it_is(text: str) -> None:
    assert readable(text) == text


@pytest.mark.parametrize("text", ["federation.names=[a,", "rank=range(1,3", "data.path='/a.csv", "seed=1,2,", "data.label=a (b)", "x={a"])
def test_what_may_mean_two_things_is_one_line_with_both_remedies(text: str) -> None:
    key, _, value = text.partition("=")
    with pytest.raises(UserError, match=rf"^cannot read '{re.escape(text)}': close its brackets .* two pairs of quotes: ") as caught:
        readable(text)
    # The remedy is one.
    remedy = str(caught.value).rpartition(": ")[2].strip('"')
    assert OverridesParser.create().parse_override(remedy).value() == value
    assert "Exception" not in str(caught.value)
    assert key in remedy


def test_no_equals_sign_and_several_values_say_so() -> None:
    with pytest.raises(UserError, match=r"^cannot read 'seed': an override is KEY=VALUE"):
        readable("seed")
    with pytest.raises(UserError, match=r"^'data.path=/a,b.csv' names several values: add -m .* \"data.path='/a,b.csv'\"$"):
        check_single(["data.path=/a,b.csv"])
    with pytest.raises(UserError, match=r"^'rank=1,2' names several values"):
        load(["rank=1,2"])


def test_a_group_without_an_option_names_the_options() -> None:
    with pytest.raises(UserError, match=r"^method= names none of its files; choose from abba, abba_alternating, "):
        load(["method="])
    assert load(["data=files", "data.path=/a/café (1).csv"]).data.path == "/a/café (1).csv"


OPTIONS = {group: sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) for group in ("method", "experiment")}


WHOLE = r" with method '\w+': each client keeps its own B, "
# Experiment -> what it asks for that not all methods have, by the method's own words.
REFUSED = {
    "private": rf"^privacy\.unit=example({WHOLE}|: method 'full' needs privacy\.unit!=example; | with method=untouched: nobody trains; )",
    "demo_llm": rf"^(eval\.scores=\[exact_match\]{WHOLE}|method=centralized with federation\.partition\.kind=natural and train\.local_)",
    "sums_small": rf"^eval\.scores=\[exact_match\]{WHOLE}",
}
NOT_TOGETHER = {("private", "full"), ("private", "untouched"), ("demo_llm", "centralized")}


def keeps_its_own(method: str) -> bool:
    return "federation.evaluate_clients=true" in (conf_dir() / "method" / f"{method}.yaml").read_text(encoding="utf-8")


# Composing takes a third of a second: of all pairs a sixth, each method in some and each experiment in some, and all that are refused. The
# first look is composed with every method elsewhere.
PAIRS = [
    (experiment, method)
    for i, experiment in enumerate(OPTIONS["experiment"])
    for j, method in enumerate(OPTIONS["method"])
    if (i + j) % 6 == 0 or (experiment in REFUSED and keeps_its_own(method)) or (experiment, method) in NOT_TOGETHER
]


@pytest.mark.parametrize(("experiment", "method"), PAIRS)
def test_every_experiment_goes_with_every_method(experiment: str, method: str) -> None:
    overrides = [f"experiment={experiment}", f"method={method}"]
    if experiment in REFUSED and (SPECS[load([f"method={method}"]).method.adapter].own or (experiment, method) in NOT_TOGETHER):
        with pytest.raises(UserError, match=REFUSED[experiment]):
            load(overrides)
        return
    config = load(overrides)
    assert config.method.name == method
    assert experiment != "quick" or config.init.kind != "gradient"


def test_what_a_family_lets_choose_needs_no_default_to_be_given() -> None:
    assert load(["method=fed_sb", "adapter.options.gamma=128"]).adapter.options == {"gamma": 128}
    assert load(["method=lora_one", "adapter.options.gamma=2"]).adapter.options == {"gamma": 2}
    assert sweep_jobs(["adapter.options.gamma=1,2"]) == [["++adapter.options.gamma=1"], ["++adapter.options.gamma=2"]]
    assert load(["adapter.options.gamma=1", "adapter.options.gamma=3"]).adapter.options == {"gamma": 3}
