"""From a run's folder, or that of an exported model, to the figures of ``fedsb eval``: the model beside its untouched base."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsb.app.assembly import corpus_of, model_of, task_of
from fedsb.app.finished import is_run, left_of
from fedsb.app.measuring.scoring import LOSS, SCORES, answered, answers, check_scores, measured_prompts
from fedsb.app.opening import dropped_rows
from fedsb.app.own_factors import made_again
from fedsb.app.threads import every_core
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.counting import Counter, counted_by
from fedsb.core.errors import UserError, unknown
from fedsb.data import way_of
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import plain_model
from fedsb.models.heads import remarks_on
from fedsb.models.loading import resolve_device
from fedsb.report.evaluation import Row, Sample, rows_of
from fedsb.tasks.answers import Answer

TASKS = ("loss", *SCORES)
# What may be otherwise than in the run: on what is measured, by what and where; not what the model is.
CHANGEABLE = (
    *("eval.", "data.", "train.eval_", "train.max_length=", "train.autocast=", "device="),
    *("model.name=", "model.path=", "model.tokenizer=", "model.revision="),
)


@dataclass(frozen=True)
class Side:
    """One of the models that are measured.

    Attributes:
        name: heads its column.
        config: what it is measured with.
        model: loads it, or brings the one before it to its state.
        round: whose state it is; names the stream of what is drawn.
    """

    name: str
    config: Config
    model: Callable[[], AdaptedModel]
    round: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What ``fedsb eval`` prints.

    Attributes:
        rows: of the table.
        names: what heads the columns of the base and of the model.
        remarks: what is said beside.
        answers: JSON lines of prompts, references and responses; empty where nothing was generated.
    """

    rows: Sequence[Row]
    names: tuple[str, str]
    remarks: Sequence[str] = ()
    answers: Sequence[str] = field(default=())


def evaluation(
    folder: Path, changes: Sequence[str] = (), tasks: Sequence[str] | None = None, counter: Callable[[str], Counter] | None = None
) -> Evaluation:
    """Measure the model of a run, or an exported one, and its untouched base.

    Args:
        folder: of the run, finished or not, or of an exported model.
        changes: to the run's configuration, of :data:`CHANGEABLE`; all of it for an exported model that does not lie in its run's folder.
        tasks: of :data:`TASKS`; None for the loss and what the run was scored by, exact match where the data have responses.
        counter: given the name of the model that is measured next, returns who is told how far that is; None tells nobody.

    Raises:
        UserError: nothing is there to be measured, or it cannot be measured so.
    """
    for name in tasks or ():
        if name not in TASKS:
            raise unknown("task in --tasks", name, TASKS)
    sides, remarks = _run(folder, changes) if is_run(folder) or not _is_model(folder) else _exported(folder, changes)
    found, said = [], ""
    with every_core():
        for side in sides:
            wanted = _wanted(side.config, tasks)
            adapted = side.model()
            said = check_scores(side.config, adapted, wanted)
            with counted_by(counter(side.name) if counter else None):
                found.append(_measured(side, adapted, wanted))
    based = found[0][0] if len(found) == 2 else None
    rows = {
        row.metric: row for row in sorted(rows_of(found[-1][0], based, sides[-1].config.seed), key=lambda row: row.metric == "examples")
    }
    names = (sides[0].name, sides[-1].name)
    told = filter(None, [dropped_rows(sides[-1].config, ["test"]), said])
    return Evaluation(list(rows.values()), names, [*remarks, *told], _lines(sides, [each for _, each in found]))


def _run(folder: Path, changes: Sequence[str]) -> tuple[list[Side], list[str]]:
    left = left_of(folder, "evaluate", _checked(changes))
    config, snapshot = left.config, left.snapshot
    last, planned = snapshot.round, config.federation.num_rounds

    def trained() -> AdaptedModel:
        adapted = model_of(config, corpus_of(config).labels)
        adapted.install(snapshot.state, snapshot.frozen.view().beside(made_again(config, adapted, snapshot)))
        return adapted

    remark = [] if left.whole else [f"the run did not finish: this is its last checkpoint, after round {last} of {planned}"]
    base = Side("untouched base", config, lambda: _untouched(config))
    return [base, Side(f"{config.method.name}, round {last}", config, trained, last)], remark


def _exported(folder: Path, changes: Sequence[str]) -> tuple[list[Side], list[str]]:
    own = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("fedsb_pooling", "own")
    if not is_run(folder.parent):
        config = load([*changes, "model=pretrained", f"model.name='{folder}'", f"model.pooling={own}"])
        said = ["there is no base beside it: the model does not lie in its run's folder"]
        return [Side(folder.name, config, lambda: _plain(config, said))], said
    base = left_of(folder.parent, "evaluate", _checked(changes)).config
    remarks: list[str] = []
    place: dict[str, Any] = {"kind": "pretrained", "name": str(folder.resolve()), "path": None, "revision": None, "tokenizer": None}
    config = replace(base, model=replace(base.model, **place, config={}, pooling=own))
    last = base.federation.num_rounds
    sides = [Side("untouched base", base, lambda: _untouched(base)), Side(folder.name, config, lambda: _plain(config, remarks), last)]
    return sides, remarks


def _untouched(config: Config) -> AdaptedModel:
    adapted = model_of(config, corpus_of(config).labels)
    adapted.reset()
    return adapted


def _plain(config: Config, remarks: list[str]) -> AdaptedModel:
    """Load an exported model; what is special about it comes to the remarks."""
    device = resolve_device(config.device)
    adapted = plain_model(config.model, task=task_of(config), labels=corpus_of(config).labels, seed=config.seed, device=device)
    remarks += remarks_on(adapted.model)
    return adapted


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _checked(changes: Sequence[str]) -> list[str]:
    plain = [change.lstrip("+") for change in changes]
    for change in plain:
        if "=" not in change or not change.startswith(CHANGEABLE):
            allowed = ", ".join(f"{key.rstrip('=')}{'*' if key[-1] in '._' else ''}" for key in CHANGEABLE)
            raise UserError(f"'{change}' is nothing that an evaluation can change of a run; choose from {allowed}, as KEY=VALUE")
    return plain


def _wanted(config: Config, tasks: Sequence[str] | None) -> list[str]:
    responds = task_of(config).name == "causal_lm" and way_of(config.data) is not None
    if tasks and not responds and set(tasks) & set(SCORES):
        raise UserError(f"--tasks {','.join(tasks)}: nothing in these data tells a response from its prompt; leave all but loss out")
    usual = "exact_match" if config.data.choices is None else "choice"
    return list(tasks or ["loss", *(config.eval.scores or ([usual] if responds else []))])


def _measured(side: Side, adapted: AdaptedModel, wanted: Sequence[str]) -> tuple[list[Sample], list[Answer]]:
    said = answers(side.config, adapted, side.round) if "exact_match" in wanted else []
    made = {"loss": lambda: _counted(LOSS(side.config, adapted, side.round)), "exact_match": lambda: answered(said)}
    return [made[name]() if name in made else SCORES[name](side.config, adapted, side.round) for name in wanted], said


def _counted(sample: Sample) -> Sample:
    return replace(sample, metrics=lambda chosen: {**sample.metrics(chosen), "examples": float(len(chosen))})


def _lines(sides: Sequence[Side], said: Sequence[Sequence[Answer]]) -> list[str]:
    if not said[-1]:
        return []
    prompts = measured_prompts(sides[-1].config)
    heads = [side.name for side in sides]
    return [
        json.dumps(
            {"prompt": prompt.text, "reference": prompt.reference, "expected": rows[0].expected}
            | {head: {"response": row.response, "answer": row.given, "right": row.right} for head, row in zip(heads, rows, strict=True)},
            ensure_ascii=False,
        )
        for prompt, *rows in zip(prompts, *said, strict=True)
    ]
