"""A server cannot show keys of its own as those of a client whose node's key the others know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedsb.core.errors import UserError
from fedsb.federation.certificates import node_key
from fedsb.secure.party import Check, Party
from fedsb.secure.session import Session, UnsignedError
from fedsb.secure.signing import UNSIGNED, check, private_key, public_keys, sign
from tests.secure.exchanges import SESSION

THREE = ("client-0", "client-1", "client-2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in THREE:
        node_key(tmp_path / name)
    lines = [f"{name} {(tmp_path / f'{name}.pub').read_text()}" for name in THREE]
    (tmp_path / "peers").write_text("# who is who\n" + "".join(lines))
    return tmp_path


def party(folder: Path, name: str, session: Session = SESSION) -> Party:
    key = private_key(folder / name)
    return Party.begun(session, name, 2, lambda body: sign(key, session, name, body))


def checking(folder: Path) -> Check:
    known = public_keys(folder / "peers")
    return lambda client, body, signature: check(known, SESSION, client, body, signature)


def test_signed_keys_are_taken(folder: Path) -> None:
    parties = {name: party(folder, name) for name in THREE}
    sealed = parties["client-0"].give({name: each.advertised for name, each in parties.items()}, checking(folder))
    assert sealed.keys() == {"client-1", "client-2"}


@pytest.mark.parametrize(
    "how", ["by nobody", "by another", "of another exchange", "under other settings", "of another round", "of a stranger", "changed"]
)
def test_forged_keys_are_refused(folder: Path, how: str) -> None:
    parties = {name: party(folder, name) for name in THREE}
    advertised = {name: each.advertised for name, each in parties.items()}
    body = advertised["client-1"][: -len(UNSIGNED)]
    key = private_key(folder / "client-1")
    forged = {
        "by nobody": {"client-1": body + UNSIGNED},
        "by another": {"client-1": body + sign(private_key(folder / "client-2"), SESSION, "client-1", body)},
        "of another exchange": {"client-1": body + sign(key, replace(SESSION, id=bytes(16)), "client-1", body)},
        "under other settings": {"client-1": body + sign(key, replace(SESSION, settings="others"), "client-1", body)},
        "of another round": {"client-1": body + sign(key, replace(SESSION, round=4), "client-1", body)},
        "of a stranger": {"client-9": body + sign(key, SESSION, "client-9", body)},
        "changed": {"client-1": bytes(1) + advertised["client-1"][1:]},
    }[how]
    with pytest.raises(UnsignedError, match=r"secure\.peers"):
        parties["client-0"].give({**advertised, **forged}, checking(folder))
    assert not parties["client-0"].peers  # nothing was given away


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no client"),
        ("client-0\n", "line 1 of .* holds no key"),
        ("client-0 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0Zl0d0R0F3b0J5dGVzYW5kYml0c2FuZHNvb25zb29u\n", "holds no P-384 key"),
        ("{own}{own}", "line 2 of .* names 'client-0' again"),
        ("# all\n{own}client-1 {key} of another name\n", "lines 2 and 3 of .* have one key for two clients"),
    ],
    ids=["empty", "no key", "another kind", "twice", "one key of two"],
)
def test_a_list_of_keys_that_is_none_is_told(folder: Path, text: str, said: str) -> None:
    public = (folder / "client-0.pub").read_text()
    key = " ".join(public.split()[:2])
    (folder / "peers").write_text(text.replace("{own}", f"client-0 {public}").replace("{key}", key))
    with pytest.raises(UserError, match=said):
        public_keys(folder / "peers")


def test_a_private_key_that_is_none_is_told(folder: Path) -> None:
    for name in ("peers", "client-0.pub", "nowhere"):
        with pytest.raises(UserError, match="can't be read as a private key"):
            private_key(folder / name)
