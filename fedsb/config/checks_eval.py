"""Joint rules on scores: what they need of the data, the task and the method."""

from __future__ import annotations

import re
from collections.abc import Callable

from fedsb.config.derived import family
from fedsb.config.schema import Config
from fedsb.core.errors import UserError, unknown

SCORES = ("exact_match", "choice")
RESPONDING = ("prompt", "messages", "template")  # keys of `data` that tell a response from what it answers


def _scores_are_known(config: Config) -> None:
    for name in config.eval.scores:
        if name not in SCORES:
            raise unknown("score in eval.scores", name, SCORES)


def _responses_are_there(config: Config) -> None:
    if not config.eval.scores:
        return
    said, task = f"eval.scores=[{', '.join(config.eval.scores)}]", config.model.task or config.data.task
    if task != "causal_lm":
        raise UserError(f"{said} is for language models, and the task is {task}; leave it out, or set data.task=causal_lm")
    if all(getattr(config.data, key) is None for key in RESPONDING):
        raise UserError(
            f"{said} with data.text={config.data.text}: nothing tells a response from its prompt; give data.prompt and data.response"
        )
    if own := family(config).own:
        raise UserError(
            f"{said} with method '{config.method.name}': each client keeps its own {', '.join(own)}, and the server has no whole "
            "model to ask; leave eval.scores=[]"
        )


def _choices_are_given(config: Config) -> None:
    data = config.data
    if "choice" in config.eval.scores and data.choices is None:
        raise UserError(
            "eval.scores=[choice] without data.choices: name the column of the answers to choose from, as in data.choices=choices"
        )
    if data.choices is not None and data.prompt is None and data.template is None:
        raise UserError(f"data.choices={data.choices} goes with data.prompt and data.response, or with data.template; leave it out")


def _pattern_is_used(config: Config) -> None:
    pattern, scorer = config.eval.pattern, config.eval.scorer
    if (pattern is None) == (scorer == "regex"):
        other = "add eval.pattern='answer is (.*)'" if pattern is None else "add eval.scorer=regex, or leave the pattern out"
        raise UserError(f"eval.scorer={scorer} with eval.pattern={'null' if pattern is None else pattern}: {other}")
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"eval.pattern={pattern} is no regular expression ({error}); correct it") from None


def _drawing_has_a_temperature(config: Config) -> None:
    if config.eval.top_p < 1 and not config.eval.temperature:
        raise UserError(
            f"eval.top_p={config.eval.top_p:g} with eval.temperature=0, which draws nothing; add eval.temperature=1, or leave top_p out"
        )


def _stops_say_something(config: Config) -> None:
    if "" in config.eval.stop:
        raise UserError("eval.stop holds an empty text, which every response begins with; leave it out")


def _a_choice_has_a_validation_part(config: Config) -> None:
    data, wanted = config.data, config.eval.select
    part = next((f"data.{key}" for key in ("validation_path", "validation_fraction") if getattr(data, key)), None)
    if wanted is None:
        key = part or ("eval.patience" if config.eval.patience else "eval.direction" if config.eval.direction != "auto" else None)
        if key:
            raise UserError(f"{key} without eval.select, which it is for: add eval.select=accuracy, or another metric, or leave it out")
        return
    if not part:
        raise UserError(
            f"eval.select={wanted} without a validation part, and the test part chooses nothing; set data.validation_fraction=0.1 or "
            "data.validation_path=…"
        )
    if own := family(config).own:
        raise UserError(
            f"eval.select={wanted} with method '{config.method.name}': each client keeps its own {', '.join(own)}, and the server has no "
            "whole model to choose; leave eval.select=null"
        )


EVAL_RULES: tuple[Callable[[Config], None], ...] = (
    _scores_are_known,
    _responses_are_there,
    _choices_are_given,
    _pattern_is_used,
    _drawing_has_a_temperature,
    _stops_say_something,
    _a_choice_has_a_validation_part,
)
