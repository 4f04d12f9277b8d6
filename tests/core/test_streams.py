"""Output that lacks a character, or a reader."""

from __future__ import annotations

import io
import os
import sys

import pytest

from fedsb.core.streams import hand_on, spell_out


def test_what_an_encoding_lacks_is_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in {"latin-1": b"x ... \xe9 \\u8a9e", "ascii": b"x ... \\xe9 \\u8a9e", "utf-8": "x … é 語".encode()}.items():
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        spell_out()
        print("x … é 語", end="", flush=True)
        assert stream.buffer.getvalue() == expected  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", None)
    spell_out()
    assert hand_on(0) == 0


def test_a_reader_that_has_left_ends_it_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("a line")
        assert hand_on(0) == 141
        print("another", flush=True)
        assert hand_on(2) == 2


def test_a_full_disk_behind_standard_output_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("a line")
        assert hand_on(0) == 1
        assert hand_on(0) == 0
    assert capsys.readouterr().err == "error: no space left on device\n"
