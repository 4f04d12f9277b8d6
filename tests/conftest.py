"""What many tests share: tiny random models with a tokeniser of their own, and a small table that can be learnt."""

from __future__ import annotations

import csv
import gc
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.schemas import faults_below

# The same examples on every machine, so that a red run can be repeated; others with --hypothesis-profile=exploring.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("exploring", deadline=None)
settings.load_profile("repeatable")

HIDDEN = 32
ROWS = 120
TOPICS = {
    "film": ("actor", "cinema", "scene", "director", "screen", "studio"),
    "sport": ("goal", "match", "team", "coach", "league", "score"),
    "trade": ("bank", "market", "price", "share", "profit", "tax"),
}
FILLERS = ("a", "the", "of", "and", "new", "old", "said", "was", "last", "year", "week", "about")
ENCODER = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
DECODER = ["<unk>", "<s>", "</s>"]  # no padding token, as in GPT-2 and Llama


def pytest_collection_finish() -> None:
    """Let the collector look through what is imported this once: a pass takes half a second, and tests ask for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """No test loses power, and a process that is killed loses nothing that it has written; ``test_disk`` holds what is synced and when."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _process_left_as_found() -> Iterator[None]:
    """What belongs to the whole process is as it was behind every test; but for the answer to SIGTERM, which Ray takes and keeps."""
    before = _of_process()
    yield
    assert _of_process() == before


@pytest.fixture(autouse=True, scope="session")
def _records_by_their_schemas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs that tests share have recorded, and whatever is left at the end, is as the published schemas say."""
    yield
    assert faults_below(tmp_path_factory.getbasetemp()) == []


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Hold what a test has recorded in its own folder against the schemas, before the folder goes."""
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    found = faults_below(folder) if folder else []
    yield
    assert found == []


def _of_process() -> dict[str, object]:
    mask = os.umask(0o022)
    os.umask(mask)
    return {
        "mask of new files": oct(mask),
        "folder": os.getcwd(),
        "on SIGINT": signal.getsignal(signal.SIGINT),
        "collects garbage": gc.isenabled(),
        "default dtype": torch.get_default_dtype(),
        "takes gradients": torch.is_grad_enabled(),
        "only deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the slow tests out, first in what each worker begins with; what is fast fills the gaps.

    Those of one folder share what they start (Ray, a wheel of the project), so that they stay together while others have work of their own.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    hands = dealt_by_folder(slow, workers)
    dealt: list[pytest.Item] = []
    for number, first in enumerate(hands):
        # pytest-xdist hands out contiguous parts of equal size.
        rest = max(0, (len(items) - len(dealt)) // (workers - number) - len(first))
        dealt += [*first, *fast[:rest]]
        fast = fast[rest:]
    items[:] = [*dealt, *fast]


def dealt_by_folder(tests: list[pytest.Item], hands: int) -> list[list[pytest.Item]]:
    """Deal tests out by folder, the one with most of them first, each to whoever has the fewest."""
    folders: dict[Path, list[pytest.Item]] = {}
    for test in tests:
        folders.setdefault(test.path.parent, []).append(test)
    dealt: list[list[pytest.Item]] = [[] for _ in range(hands)]
    for folder in sorted(folders.values(), key=len, reverse=True):
        min(dealt, key=len).extend(folder)
    return dealt


def made_rows() -> list[tuple[str, str]]:
    """Return (text, label) rows of 4 to 11 words, about half of them words of the label."""
    generator = np.random.default_rng(7)
    rows = []
    for i in range(ROWS):
        label = sorted(TOPICS)[i % len(TOPICS)]
        words = [str(generator.choice((*TOPICS[label], *FILLERS[:6]))) for _ in range(generator.integers(3, 10))]
        rows.append((" ".join([str(generator.choice(TOPICS[label])), *words]), label))
    return rows


def made_tokenizer(specials: Sequence[str]) -> Tokenizer:
    """Train a tokeniser on whole words; ``specials`` come first in the vocabulary."""
    unknown = next(s for s in specials if "unk" in s.lower())
    tokenizer = Tokenizer(WordLevel(unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    lines = [" ".join(FILLERS), *(" ".join(words) for words in TOPICS.values())]
    tokenizer.train_from_iterator(lines, WordLevelTrainer(special_tokens=list(specials), show_progress=False))
    return tokenizer


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokeniser that frames texts, and pairs of texts, as BERT does."""
    tokenizer = made_tokenizer(ENCODER)
    frame = [("[CLS]", ENCODER.index("[CLS]")), ("[SEP]", ENCODER.index("[SEP]"))]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=frame)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokeniser without a padding token, as decoders often have."""
    tokenizer = made_tokenizer(DECODER)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=48)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write model and tokeniser as ``save_pretrained`` does."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with the columns text and label: 120 rows, three labels, whose words give them away."""
    path = tmp_path_factory.mktemp("table") / "tiny.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(made_rows())
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT body (no head) and its tokeniser."""
    tokenizer = encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return save(BertModel(config), tokenizer, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer GPT-2, whose linear layers are ``Conv1D``, and its tokeniser."""
    tokenizer = decoder_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=HIDDEN, n_layer=2, n_head=2, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return save(GPT2LMHeadModel(config), tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama with grouped-query attention, and its tokeniser."""
    tokenizer = decoder_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("llama"))
