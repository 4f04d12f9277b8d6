"""Data: sources of rows, examples, splits, partitions over simulated clients, and batches."""

from __future__ import annotations

from fedsb.data.batches import Feature, limit_of, made_row, order, packed, pad, pad_id, tokenise, whole_ids
from fedsb.data.examples import Examples, Targets, find_labels, natural_order, read_examples
from fedsb.data.instructions import shortened, way_of
from fedsb.data.learnt import answered, answered_corpus, marked, tokenise_marked
from fedsb.data.partition import PARTITIONERS, partition
from fedsb.data.private_rows import PrivateRows, count_rows, read_private_rows
from fedsb.data.prompts import Continuation, Prompt, continuations, end_ids, prompts_of
from fedsb.data.sources import PATHLESS, SOURCES, Raw, read_path, read_raw
from fedsb.data.splits import Corpus, hold_out, load_corpus, load_site, load_test, places_held, thin

__all__ = [
    "PARTITIONERS",
    "PATHLESS",
    "SOURCES",
    "Continuation",
    "Corpus",
    "Examples",
    "Feature",
    "PrivateRows",
    "Prompt",
    "Raw",
    "Targets",
    "answered",
    "answered_corpus",
    "continuations",
    "count_rows",
    "end_ids",
    "find_labels",
    "hold_out",
    "limit_of",
    "load_corpus",
    "load_site",
    "load_test",
    "made_row",
    "marked",
    "natural_order",
    "order",
    "packed",
    "pad",
    "pad_id",
    "partition",
    "places_held",
    "prompts_of",
    "read_examples",
    "read_path",
    "read_private_rows",
    "read_raw",
    "shortened",
    "thin",
    "tokenise",
    "tokenise_marked",
    "way_of",
    "whole_ids",
]
