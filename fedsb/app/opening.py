"""What is said before the first round: of the classes, the texts, the model and the runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsb.app.assembly import corpus_of, task_of, tokenizer_of
from fedsb.config.schema import Config
from fedsb.core.rng import numpy_generator
from fedsb.data import Examples, limit_of, marked, way_of, whole_ids
from fedsb.data.framing import has_template
from fedsb.models.pooling import pooling_remark
from fedsb.report.classes import class_lines
from fedsb.runtime.grid import SimulationGrid
from fedsb.runtime.stack_size import ranks_remark, stack_remark

LOOKED_AT = 250  # texts, to tell how many are cut


def opening_remarks(
    config: Config, grid: Any, labels: Sequence[str], told: Sequence[str] = (), *, counts: Mapping[str, int]
) -> Iterator[str]:
    """Yield the lines that a run opens with.

    Args:
        config: of the run.
        grid: that the run goes over.
        labels: names of the classes, in order.
        told: further lines.
        counts: training examples by client.
    """
    stacks = (stack_remark(config, grid), ranks_remark(config, grid, counts))
    runtime = (*stacks, grid.remark if isinstance(grid, SimulationGrid) else "")
    texts = (template_remark(config), dropped_rows(config), cut_texts(config), shared_texts(config))
    lines = (*class_lines(labels), *texts, pooling_remark(config.model.pooling, "this run"), *runtime, *told)
    yield from filter(None, lines)


def cut_texts(config: Config) -> str:
    """Say what share of the training texts, or of the test texts where there are none here, is cut; nothing where none is.

    Of many texts it looks at :data:`LOOKED_AT`, drawn by the seed.
    """
    corpus, tokenizer = corpus_of(config), tokenizer_of(config)
    part, examples = ("training texts", corpus.train) if len(corpus.train) else ("test texts", corpus.test)
    if len(examples) > LOOKED_AT:
        rows = numpy_generator(config.seed, "cut texts").choice(len(examples), LOOKED_AT, replace=False)
        part, examples = f"{LOOKED_AT:,} {part} looked at", examples.take(rows.tolist())
    limit = limit_of(tokenizer, config.train.max_length)
    share = _cut(config, examples, limit) / max(1, len(examples))
    if not share:
        return ""
    whose = "train.max_length" if limit == config.train.max_length else "the model's limit"
    lost = "the ends of their responses" if way_of(config.data) else "their ends"
    return f"{share:.{0 if share >= 0.01 else 1}%} of the {part} are longer than {whose}={limit} tokens: {lost} are cut off"


def _cut(config: Config, examples: Examples, limit: int) -> int:
    """Return how many texts lose something that is learnt."""
    tokenizer = tokenizer_of(config)
    if way_of(config.data):
        return sum(any(row.learnt[limit:]) for row in marked(examples, tokenizer, config.data))
    return sum(len(ids) > limit for ids in whole_ids(examples, tokenizer, ends=not task_of(config).has_head))


def dropped_rows(config: Config, parts: Sequence[str] = ("train", "test", "public", "validation")) -> str:
    """Say how many rows of instruction data are left out of parts of the data; nothing where none is."""
    corpus, limit = corpus_of(config), limit_of(tokenizer_of(config), config.train.max_length)
    dropped = {part: count for part, count in corpus.dropped.items() if part in parts}
    if not dropped:
        return ""
    told = ", ".join(f"{count:,} of {count + len(getattr(corpus, part)):,} {part} rows" for part, count in dropped.items())
    return f"left out: {told}, of whose responses {limit} tokens (train.max_length, or the model's limit) leave nothing"


def shared_texts(config: Config) -> str:
    """Say how many rows of a validation part of its own stand in the test part too; nothing where none do."""
    validation, test = corpus_of(config).validation, corpus_of(config).test
    if validation is None or config.data.validation_path is None:
        return ""
    tested = set(test.whole_texts())
    shared = sum(text in tested for text in validation.whole_texts())
    return f"{shared:,} of {len(validation):,} validation rows have texts of the test part, which are to choose nothing" if shared else ""


def template_remark(config: Config) -> str:
    """Say what conversations are written as where the tokenizer has no chat template."""
    if way_of(config.data) in (None, "template") or has_template(tokenizer_of(config)):
        return ""
    return "the tokenizer has no chat template: conversations are written as data.template=plain does (User: …, Assistant: …)"
