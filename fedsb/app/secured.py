"""A client's part in the secure sums of a run, from message to message: each may have a process of its own, so what is kept lies on disk.

What the client knows of the run itself, and not what the server says, decides how many must be in a sum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from fedsb.app.secured_terms import hold_bound, hold_own, hold_weights
from fedsb.config.derived import client_names
from fedsb.config.schema import Config
from fedsb.core.cohort import cohort_size
from fedsb.core.disk import locked, make_folder, replace_whole
from fedsb.core.errors import UserError
from fedsb.core.state import Layout, State, non_finite
from fedsb.node.settings import NodeConfig
from fedsb.node.values import NodeConfigError
from fedsb.run.resuming import PATHS, fingerprint
from fedsb.secure.fixed_point import FixedPoint
from fedsb.secure.keys import CONFIRMED, SEALED, Secrets
from fedsb.secure.party import ADVERTISED, Check, Party, unchecked
from fedsb.secure.session import SecureError, Session
from fedsb.secure.signing import check, private_key, public_keys, sign
from fedsb.secure.threshold import threshold_of
from fedsb.wire.messages import Instruction
from fedsb.wire.secured import Secured, joined, masked_state, sealed_state

FOLDER = "secure"  # of what clients keep of an exchange, beside what else is their own
Read = TypeVar("Read")
EXCHANGE, ANSWERED, LOCK = "exchange.json", "answered.json", "lock"
Given = ParamSpec("Given")
Step = Callable[Concatenate["Desk", Given], State]


def _one_by_one(step: Step[Given]) -> Step[Given]:
    """Let no other message of the client come between what a step reads and what it keeps: two lists would be confirmed at once."""

    @wraps(step)
    def alone(desk: Desk, /, *args: Given.args, **more: Given.kwargs) -> State:
        make_folder(desk.folder)
        with locked(desk.folder / LOCK):
            desk.__dict__.pop("_party", None)  # read before the lock was there
            return step(desk, *args, **more)

    return alone


class Desk:
    """Where one message of a secure sum is answered.

    Args:
        config: of the run, as the message gives it.
        instruction: the message.
        folder: of what the client keeps; made if need be.
        node: what the operator has said; None of a simulated client.
        overrides: of the run, as the message's context has them.

    Raises:
        SecureError: the run has no secure sums, or the message is of none.
    """

    def __init__(self, config: Config, instruction: Instruction, folder: Path, node: NodeConfig | None, overrides: str = "") -> None:
        if not config.federation.secure_sum:
            raise SecureError("federation.secure_sum=false: the server asks for a secure sum, and this run has none")
        if instruction.secured is None:
            raise SecureError("federation.secure_sum=true: the server asks for an upload without masks")
        self._config = config
        self._told: Secured = instruction.secured
        self._instruction = instruction
        self._overrides = overrides
        self._client = instruction.client
        self.folder = folder
        self._node = node
        settings = fingerprint(config, without=PATHS)
        self._session = Session(instruction.origin, instruction.round, self._told.session, settings)

    @_one_by_one
    def advertise(self) -> State:
        """Draw secrets and return the public part; asked again in the same exchange, the same one."""
        if (kept := self._kept()) is not None and kept.session == self._session:
            return sealed_state(kept.advertised)
        path = self._node.secure.key if self._node else None
        key = None if path is None else _own_file("secure.key", lambda: private_key(Path(path)))
        party = Party.begun(self._session, self._client, self._threshold, lambda body: sign(key, self._session, self._client, body))
        self._keep(party)
        return sealed_state(party.advertised)

    @_one_by_one
    def give(self) -> State:
        """Return the shares of the own secrets, sealed for the others.

        Raises:
            SecureError: clients are named that the run does not have, or more than a round draws, or :meth:`fedsb.secure.party.Party.give`.
        """
        party, members = self._party, self._told.members
        if strange := sorted({*members} - {*client_names(self._config)}):
            raise SecureError(f"'{strange[0]}' is no client of this run")
        if len(members) > self._cohort:
            raise SecureError(f"{len(members)} clients are shown, and a round of this run has {self._cohort}")
        sealed = party.give(self._told.parts(self._told.members, ADVERTISED), self._check)
        self._keep(party)
        return sealed_state(joined(sealed))

    @_one_by_one
    def mask(self, upload: State, begun: State, count: int, held: str = "") -> State:
        """Return an upload's difference to what the client was sent, in fixed point and masked.

        Args:
            upload: what was trained.
            begun: what the client was sent of that, and of more.
            count: its training examples.
            held: digest of all that the client holds of the frozen part that the server has sent.

        Raises:
            SecureError: the weights, the bound or what it is to go on from are none of this run, the upload is not finite, which nobody
                could see in the sum, or :meth:`fedsb.secure.party.Party.mask`.
        """
        if broken := non_finite(upload):
            raise SecureError(f"{broken.role} of '{broken.module}' holds NaN or infinity; lower train.lr")
        told, party, i = self._told, self._party, self._instruction
        share = told.share(self._client)
        hold_weights(self._config.federation, told, self._client, count)
        hold_bound(self._config, told.bound, count)
        hold_own(self._config, i.own, [number for number in map(int, self._answered) if number < i.round], count)
        moved = [(t.double() - begun[name].double() if name in begun else t.double()).reshape(-1) for name, t in upload.items()]
        words = FixedPoint(told.bound, len(told.members)).encode(torch.cat(moved).numpy(), share)
        others = [name for name in told.members if name != self._client]
        more = (i.stage, i.carried, i.rank, i.ranks, i.made_in)
        work = told.terms(i.labels, i.frozen, held, i.digest, *more, flats=i.flats)
        masked = party.mask(words, told.parts(others, SEALED), hashlib.sha256(work + self._overrides.encode()).digest())
        party.work = work
        self._keep(party)
        return masked_state(masked, Layout.of(upload))

    @_one_by_one
    def confirm(self) -> State:
        """Return what shows to each of the others whose uploads have arrived that this client was told of them.

        Raises:
            SecureError: :meth:`fedsb.secure.party.Party.confirm`.
        """
        party = self._party
        found = party.confirm(self._told.members)
        self._keep(party)
        return sealed_state(joined(found))

    @_one_by_one
    def answer(self) -> State:
        """Return the shares that unmask the sum of those whose uploads have arrived.

        Raises:
            SecureError: shares of this round were given for another sum, perhaps before the run was resumed, or
                :meth:`fedsb.secure.party.Party.answer`.
        """
        party, number = self._party, str(self._session.round)
        over = hashlib.sha256(json.dumps([self._session.settings, party.work.hex(), sorted(self._told.members)]).encode()).hexdigest()[:32]
        answered = self._answered
        if answered.get(number, over) != over:
            raise SecureError(
                f"shares for another sum of round {number} were given before (over others, or weighted, bounded or trained otherwise), and "
                "of the two sums the difference would stand open; begin another run, or go on with the same clients"
            )
        others = [name for name in self._told.members if name != self._client]
        said = party.answer(self._told.members, self._told.parts(others, CONFIRMED))
        # Before they leave, and of this run alone: a simulation begun anew may have the same folder.
        self._write(ANSWERED, {self._session.run: {**answered, number: over}})
        self._keep(party)
        return sealed_state(party.terms + joined(said))

    @property
    def _answered(self) -> dict[str, str]:
        """For which sum of each round of this run shares were given."""
        found: dict[str, str] = (self._read(ANSWERED) or {}).get(self._session.run, {})
        return found

    @property
    def _threshold(self) -> int:
        return threshold_of(self._cohort, self._config.federation.secure_dropout)

    @property
    def _cohort(self) -> int:
        return cohort_size(len(client_names(self._config)), self._config.federation.fraction)

    @property
    def _check(self) -> Check:
        if self._node is None or self._node.secure.peers is None:
            return unchecked
        path = Path(self._node.secure.peers)
        known = _own_file("secure.peers", lambda: public_keys(path))
        return lambda client, body, signature: check(known, self._session, client, body, signature)

    @cached_property
    def _party(self) -> Party:
        kept = self._kept()
        if kept is not None and kept.session.id == self._session.id and kept.session.settings != self._session.settings:
            raise SecureError("this message brings other settings of the run than those by which the exchange began")
        if kept is None or kept.session != self._session or kept.client != self._client:
            raise SecureError("the secrets of this exchange are not here; the round must begin again")
        return kept

    def _kept(self) -> Party | None:
        found = self._read(EXCHANGE)
        return None if found is None else _party_of(found)

    def _keep(self, party: Party) -> None:
        self._write(EXCHANGE, _plain(asdict(party)))

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: object) -> None:
        replace_whole(self.folder / name, json.dumps(content))


def _own_file(key: str, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except UserError as error:
        raise NodeConfigError(str(error), key=key) from None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _party_of(found: dict[str, Any]) -> Party:
    def of_bytes(values: Mapping[str, str]) -> dict[str, bytes]:
        return {key: bytes.fromhex(value) for key, value in values.items()}

    session = found.pop("session")
    return Party(
        **{
            **found,
            "session": Session(session["run"], session["round"], bytes.fromhex(session["id"]), session.get("settings", "")),
            "secrets": Secrets(**of_bytes(found["secrets"])),
            **{key: bytes.fromhex(found.get(key, "")) for key in ("advertised", "terms", "work")},
            "survivors": tuple(found["survivors"]),
            **{each.name: of_bytes(found[each.name]) for each in fields(Party) if each.name in ("peers", "sealed", "shares", "said")},
        }
    )
