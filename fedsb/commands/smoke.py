"""A federation of seconds, made of nothing that lies anywhere: random weights, words of its own, two clients, one round."""

from __future__ import annotations

import io
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

WORDS = {"sea": "wave harbour tide salt", "hill": "rock summit path goat"}
SHAPE = {
    "model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "vocab_size": 64,
}  # fmt: skip


def smoke_run() -> int:
    """Run it in a folder that goes afterwards, and return the bytes that its clients were sent and have sent.

    Raises:
        Exception: whatever is wrong.
    """
    from fedsb.client_app import app
    from fedsb.config.compose import load
    from fedsb.runtime.local import LocalGrid
    from fedsb.server_app import serve

    with tempfile.TemporaryDirectory(prefix="fedsb-doctor-") as name, _at_home_in(Path(name)), _unheard():
        overrides = _overrides(Path(name))
        grid = LocalGrid.simulation(app, {"overrides": shlex.join(overrides)})
        try:
            return int(serve(load(overrides), grid, Path(name) / "run")["payload_total"])
        finally:
            grid.close()


def _overrides(folder: Path) -> list[str]:
    table, words = folder / "rows.csv", folder / "words"
    rows = [f"{word} {other},{label}" for label, text in WORDS.items() for word in text.split() for other in text.split()]
    table.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    _save_tokenizer(words)
    return [
        "model=pretrained", "model.kind=config", "model.name=smoke", f"model.tokenizer='{words}'",
        *(f"+model.config.{key}={value}" for key, value in SHAPE.items()),
        "data=files", f"data.path='{table}'", "rank=2", "init.kind=weight_svd", "federation.num_clients=2", "federation.num_rounds=1",
        "federation.partition.kind=iid", "train.local_steps=1", "train.max_length=8", "plots=false",
    ]  # fmt: skip


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "[UNK]", *" ".join(WORDS.values()).split()]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32).save_pretrained(folder)


@contextmanager
def _at_home_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("FEDSB_HOME")
    os.environ["FEDSB_HOME"] = str(folder / "home")
    try:
        yield
    finally:
        if before is None:
            del os.environ["FEDSB_HOME"]
        else:
            os.environ["FEDSB_HOME"] = before


@contextmanager
def _unheard() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
