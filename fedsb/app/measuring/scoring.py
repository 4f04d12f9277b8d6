"""What a model is measured by on the server's test part: its loss, and the scores that ``eval.scores`` asks for beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsb.app.assembly import TEST, VALIDATION, corpus_of, measured_examples, measured_features, task_of, tokenizer_of
from fedsb.config.derived import line_feeds
from fedsb.config.schema import Config
from fedsb.core.errors import UserError, unknown
from fedsb.core.rng import torch_stream
from fedsb.data import Continuation, Prompt, continuations, end_ids, prompts_of
from fedsb.data.examples import PARTS
from fedsb.data.instructions import RowError
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import autocast
from fedsb.models.evaluate import measured
from fedsb.report.evaluation import Sample
from fedsb.report.series import BESIDE
from fedsb.run.predictions import Predictions
from fedsb.tasks.answers import Answer, answer_items, answer_metrics, chance_of, expected_answers, judge, scorer_for
from fedsb.tasks.choice import Choice, choice_items, choice_metrics
from fedsb.tasks.generation import Decoding, generate, text_of


def samples(config: Config, adapted: AdaptedModel, round_number: int, part: str = TEST) -> list[Sample]:
    """Measure the task's metrics, its loss first, and the scores.

    Args:
        config: of the run.
        adapted: with the state to be measured installed.
        round_number: names the stream that sampled responses are drawn from.
        part: of the data.
    """
    return [make(config, adapted, round_number, part) for make in (LOSS, *(SCORES[score] for score in config.eval.scores))]


def figures(found: Sequence[Sample]) -> dict[str, float]:
    """Return the metrics of samples."""
    return {name: value for sample in found for name, value in sample.all().items()}


def predictions(config: Config, found: Sequence[Sample], round_number: int) -> Predictions:
    """Return what was measured of each item of the test part after a round."""
    columns = {name: column for sample in found for name, column in sample.items.items()}
    return Predictions(round_number, measured_examples(config).sha256(), columns)


def answers(config: Config, adapted: AdaptedModel, round_number: int, part: str = TEST) -> list[Answer]:
    """Let the model answer the prompts of the test part, and hold what it says against the references."""
    prompts, tokenizer, network, decoding = measured_prompts(config, part), tokenizer_of(config), adapted.model, decoding_of(config)
    adapted.model.eval()
    with torch_stream(config.seed, "eval.generate", round_number), autocast(config.train, adapted.device):
        rows = generate(
            network,
            tokenizer,
            [prompt.ids for prompt in prompts],
            decoding,
            ends=end_ids(prompts, tokenizer, _own_end(network)),
            most=config.train.eval_batch_size,
            tokens=config.train.eval_tokens,
        )
    said = [text_of(tokenizer, row, decoding.stop) for row in rows]
    return judge(rule_of(config, prompts), config.eval.pattern, said, [prompt.reference for prompt in prompts])


def measured_prompts(config: Config, part: str = TEST) -> list[Prompt]:
    """Return the prompts of the test part, or of what ``eval.max_examples`` leaves of it: of the rows that the loss is measured on."""
    return prompts_of(measured_examples(config, part), tokenizer_of(config), config.data)


def decoding_of(config: Config) -> Decoding:
    r"""Return how responses are generated; ``\n`` in a text of ``eval.stop`` is a line feed."""
    e = config.eval
    return Decoding(e.max_new_tokens, e.temperature, e.top_p, tuple(map(line_feeds, e.stop)))


def rule_of(config: Config, prompts: list[Prompt]) -> str:
    """Return the name of the rule by which answers are read."""
    return scorer_for([prompt.reference for prompt in prompts]) if config.eval.scorer == "auto" else config.eval.scorer


def check_scores(config: Config, adapted: AdaptedModel, scores: Sequence[str] | None = None, part: str = TEST) -> str:
    """Hold a part of the data against the scores that are asked for, and say what will be measured; nothing where none are.

    Args:
        config: of the run.
        adapted: the model.
        scores: None for those of ``eval.scores``.
        part: of the data.

    Raises:
        UserError: a reference has no answer, or a prompt leaves no room for a response.
    """
    wanted = config.eval.scores if scores is None else scores
    if "choice" in wanted:
        _check_choices(config, adapted, part)
    if "exact_match" not in wanted:
        return ""
    prompts, most = measured_prompts(config, part), config.eval.max_new_tokens
    rule, limit, longest = rule_of(config, prompts), _places(adapted, config), max(len(prompt.ids) for prompt in prompts)
    if longest + most > limit:
        raise UserError(
            f"eval.max_new_tokens={most}: the longest prompt of {PARTS[part]} has {longest} tokens, and the model reads {limit} in all; "
            + (f"lower it to {limit - longest} or less" if limit > longest else "leave that row out")
        )
    chance = chance_of(expected_answers(rule, config.eval.pattern, [prompt.reference for prompt in prompts], PARTS[part]))
    return (
        f"exact match on {len(prompts):,} {part} rows by eval.scorer={rule}, of responses of up to {most} tokens; always giving the "
        f"commonest right answer would score {chance:.3f}"
    )


def check_selection(config: Config, adapted: AdaptedModel) -> None:
    """Hold that what a round is to be chosen by will be measured on the validation part, and not on the test part.

    Raises:
        UserError: there is no such part, no such metric, it cannot be scored, or it is the test part.
    """
    if config.eval.select is None:
        return
    if config.data.validation_path and not {*measured_examples(config, VALIDATION).whole_texts()} - {*corpus_of(config).test.whole_texts()}:
        raise UserError(
            f"data.validation_path={config.data.validation_path}: every text of it is one of the test part, and that chooses nothing; "
            "give another file, or data.validation_fraction=0.1 in its place"
        )
    check_scores(config, adapted, part=VALIDATION)
    names = [name for name in _metric_names(config, adapted) if name not in BESIDE]
    if config.eval.select not in names:
        raise unknown("eval.select", config.eval.select, names)


def _metric_names(config: Config, adapted: AdaptedModel) -> list[str]:
    """Return the names of all that is measured, of a row or two of the validation part."""
    task, scores = task_of(config), config.eval.scores
    records, targets = measured(adapted, task, measured_features(config, VALIDATION)[:2], train=config.train)
    found = [*task.metrics(records, targets)]
    if "exact_match" in scores:
        prompt = measured_prompts(config, VALIDATION)[0]
        found += answer_metrics(judge(rule_of(config, [prompt]), config.eval.pattern, [""], [prompt.reference]))
    if "choice" in scores:
        options, right = measured_choices(config, VALIDATION)[0]
        found += choice_metrics([Choice(tuple(0.0 for _ in options), tuple(each.length for each in options), right)])
    return found


def _check_choices(config: Config, adapted: AdaptedModel, part: str) -> None:
    given, limit = measured_choices(config, part), _places(adapted, config)
    longest = max(len(each.ids) for options, _ in given for each in options)
    if longest > limit:
        raise UserError(f"data.choices={config.data.choices}: a prompt with its answer has {longest} tokens, and the model reads {limit}")


def _places(adapted: AdaptedModel, config: Config) -> int:
    """Return how many tokens the model reads at most."""
    settings: Any = adapted.model.config
    found = getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)
    limit = int(tokenizer_of(config).model_max_length)
    return min(limit, int(found)) if found else limit


def _own_end(network: Any) -> Any:
    return getattr(network.generation_config, "eos_token_id", None)


def answered(rows: Sequence[Answer]) -> Sample:
    """Return what the scores of answers are made of."""
    return Sample(len(rows), lambda chosen: answer_metrics([rows[i] for i in chosen]), _flags(answer_items(rows)))


def _flags(found: Mapping[str, Sequence[bool]]) -> dict[str, NDArray[np.uint8]]:
    return {name: np.array(values, np.uint8) for name, values in found.items()}


def _exact_match(config: Config, adapted: AdaptedModel, round_number: int, part: str = TEST) -> Sample:
    return answered(answers(config, adapted, round_number, part))


def _loss(config: Config, adapted: AdaptedModel, _: int, part: str = TEST) -> Sample:
    task = task_of(config)
    records, targets = measured(adapted, task, measured_features(config, part), train=config.train)
    items = {name: column.numpy() for name, column in task.items(records, targets).items()}
    return Sample(len(records), lambda chosen: task.metrics(records[chosen], None if targets is None else targets[chosen]), items)


def choices(config: Config, adapted: AdaptedModel, part: str = TEST) -> list[Choice]:
    """Return how likely the model finds each of the answers that the test part gives to choose from."""
    given = measured_choices(config, part)
    features = [{"input_ids": list(each.ids), "learnt": list(each.answer)} for options, _ in given for each in options]
    records, _ = measured(adapted, task_of(config), features, train=config.train)
    likelihoods = iter((-records[:, 0]).tolist())
    return [Choice(tuple(next(likelihoods) for _ in options), tuple(each.length for each in options), right) for options, right in given]


def measured_choices(config: Config, part: str = TEST) -> list[tuple[list[Continuation], int]]:
    """Return the prompts of the test part with their choices, and the index of the right one.

    Raises:
        UserError: a row has none, its response is none of them, two of them are the same tokens, or one is no token at all.
    """
    try:
        found = [continuations(row, tokenizer_of(config), config.data) for row in measured_examples(config, part).texts]
    except RowError as error:
        said = f"a row of {PARTS[part]} holds {error.detail}"
        raise UserError(f"data.choices={config.data.choices}: {said}; correct it or remove the row") from None
    if lost := sum(not options for options, _ in found):
        raise UserError(
            f"data.choices={config.data.choices}: {lost} of {len(found)} {part} rows have nothing in that column; name another, or leave "
            "choice out of eval.scores"
        )
    return found


def _choice(config: Config, adapted: AdaptedModel, _: int, part: str = TEST) -> Sample:
    rows = choices(config, adapted, part)
    return Sample(len(rows), lambda chosen: choice_metrics([rows[i] for i in chosen]), _flags(choice_items(rows)))


class Score(Protocol):
    """Measures a model on a part of the data."""

    def __call__(self, config: Config, adapted: AdaptedModel, round_number: int, /, part: str = TEST) -> Sample:
        """Return what was found."""


LOSS: Score = _loss
SCORES: Mapping[str, Score] = {"exact_match": _exact_match, "choice": _choice}
