"""Which node serves which logical client.

A simulated node serves anyone; a node of a real federation serves the client that its operator named, one node a client. Whoever
does not serve is told so in its own log, and the reason stands in the server's records.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from flwr.serverapp import Grid

from fedsb.core.errors import RunError, UserError
from strategies.asking import Description, Questions
from strategies.keys import Keys
from strategies.participation import Participation
from strategies.places import Places, changed

Said = TypeVar("Said")
LOG = logging.getLogger(__name__)
POLL_S = (0.02, 1.0)  # between two looks for nodes and answers: first, and at most
SHOW_S = 10.0  # between two lines about who is missing
SHOWN = 8  # names in one line
UNNAMED = "no node that has answered names it"
NAMELESS = 'names no client; start it with --node-config \'client="…" data-path="…"\''
NOT_TOLD = "resume on real nodes, which don't see the run's folder: it does not say what the run was begun with; give its own overrides too"


class Roster:
    """The nodes of a federation.

    Attributes:
        clients: names of the logical clients.
        num_examples: training examples by client, as far as known.

    Args:
        participation: who takes part, how many must, and what is shown.
        questions: asks nodes whom they serve.
        counts: examples that clients had earlier in this run, by client; becomes ``num_examples``.
    """

    def __init__(self, participation: Participation, questions: Questions, counts: dict[str, int]) -> None:
        self.clients = participation.clients
        self.num_examples = counts
        self._p = participation
        self._real = False
        self._places = Places(self.clients, counts, replace=participation.replace_nodes)
        self._questions = questions
        self._keys = Keys(participation.node_keys)
        self._online: set[int] = set()
        self._simulated: list[int] = []
        self._pool: list[int] = []  # simulated nodes that are online
        self._troubled: dict[int, Description] = {}  # nodes that answered, but do not serve
        self._misfits: dict[int, Description] = {}  # nodes whose rank is not that of their client in this run
        self._ranks: dict[int, int | None] = {}  # that nodes have said
        self._residents: dict[str, bool] = {}  # whether a worker answers for a client
        self._told: dict[bool, set[str]] = {True: set(), False: set()}  # of whom that was said
        self._strangers: dict[int, str] = {}  # what is wrong with nodes that name no client of this run
        self._before: dict[str, int | None] = {}  # counts that simulated nodes have put others in place of
        self._order = {client: place for place, client in enumerate(self.clients)}

    @property
    def overrides(self) -> str | None:
        """The overrides that nodes must be told with each message; None where they know them, or see the run's folder."""
        return self._p.overrides if self._real else None

    def remark(self, text: str) -> None:
        """Keep what has happened to a client; records must tell it."""
        LOG.warning(text)
        self._places.remarks.append(text)

    def remarks(self) -> list[str]:
        """Return what has happened to the places since this was last asked; records must tell it."""
        found, self._places.remarks = self._places.remarks, []
        return found

    @property
    def real(self) -> bool:
        """Whether a node of a real federation, which serves one named client, has been seen."""
        return self._real

    def needed(self, of: int) -> int:
        """Return how many of ``of`` clients must answer: all of them in a real federation, unless fewer are asked for."""
        if self._p.min_replies is None:
            return of if self._real else 1
        return min(self._p.min_replies, of)

    def served(self, clients: Collection[str] | None = None) -> list[str]:
        """Return those of ``clients`` (of all) that a connected node serves."""
        return [client for client in (self.clients if clients is None else clients) if self.node_of(client) is not None]

    def node_of(self, client: str) -> int | None:
        """Return the node to send a client's messages to, or None where it is absent."""
        node = self._places.node_of(client)
        if node is not None:
            return node
        return self._pool[self._order[client] % len(self._pool)] if self._pool else None

    def rank_of(self, client: str) -> int | None:
        """Return the rank of a client's own: that of the run, or that of its node; None: the server's."""
        node = self.node_of(client)
        return self._p.ranks.get(client) or (None if node is None else self._ranks.get(node))

    def wait(self, grid: Grid, seconds: float) -> None:
        """Look for nodes until every client is served; from then on each keeps its node.

        Raises:
            RunError: too few are when the time is over and no answer is awaited any more.
        """
        self._wait(grid, seconds, self.clients, every=True)
        self._places.settle()
        if len(self.served()) < self.needed(len(self.clients)):
            raise self._too_few(self.clients)

    def gather(self, grid: Grid, seconds: float, cohort: Sequence[str], failed: dict[str, str]) -> None:
        """Look who serves a round's cohort; in a real federation wait for as many as it needs.

        Args:
            grid: Flower's.
            seconds: to wait at most.
            cohort: clients of the round.
            failed: where the reasons go if too few come.

        Raises:
            RunError: too few have come, in a real federation.
        """
        self._wait(grid, seconds if self._real else 0.0, cohort, every=False)
        if self._real and len(self.served(cohort)) < self.needed(len(cohort)):
            failed |= {client: self.why(client) for client in cohort if self.node_of(client) is None}
            raise self._too_few(cohort)
        self._tell_who_holds()

    def _wait(self, grid: Grid, seconds: float, wanted: Sequence[str], *, every: bool) -> None:
        begun = shown = time.monotonic()
        pause = POLL_S[0]
        self._look(grid)
        while len(self.served(wanted)) < (len(wanted) if every else self.needed(len(wanted))) or (self._questions.open and not self._real):
            now = time.monotonic()
            if now >= begun + seconds and self._questions.idle:
                return
            if now - shown >= SHOW_S:
                shown = now
                self._p.say(f"waiting for {self.missing(wanted)}; {now - begun:.0f} s of at most {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
            self._look(grid)

    def _too_few(self, clients: Sequence[str]) -> RunError:
        found, of = len(self.served(clients)), len(clients)
        needed = self.needed(of)
        fewer = " unless federation.min_replies says fewer" if self._p.min_replies is None and self._real else ""
        return RunError(f"only {found} of {of} clients are connected, {needed} are needed{fewer}; missing: {self.missing(clients)}")

    def _look(self, grid: Grid) -> None:
        """Look once for nodes and their answers."""
        self._see(self._keys.see(grid))
        known = self._places.nodes | self._strangers.keys() | self._misfits.keys() | set(self._simulated)
        self._questions.ask(grid, sorted(self._online - known), self.clients)
        for node, said in self._questions.answers(grid):
            self._note(grid, node, said)
        self._pool = [node for node in self._simulated if node in self._online]
        for notice in self._places.assign():
            LOG.warning("told node %d: %s", notice.node, notice.text)
            self._questions.notify(grid, notice.node, notice.text)

    def _see(self, online: set[int]) -> None:
        """Note who is online; a node that was away is asked anew, for with a key it keeps its number whatever its operator has changed."""
        self._questions.forget(online - self._online)
        self._online = online
        self._places.see(online)
        for gone in (self._strangers.keys() | self._misfits.keys()) - online:
            self._strangers.pop(gone, None)
            self._misfits.pop(gone, None)

    def _note(self, grid: Grid, node: int, said: Description) -> None:
        self._real = self._real or bool(said.client)
        if self._real and self._p.pooled:
            raise UserError(
                "this method pools the examples of all clients, which only a simulation can, and a real node is here; take another"
            )
        if said.client and self._p.resumed and self._p.overrides is None:
            raise UserError(NOT_TOLD)
        if said.trouble:
            if self._troubled.get(node) != said:
                LOG.warning("node %d did not describe itself: %s", node, said.trouble)
            self._troubled[node] = said
            return
        self._troubled.pop(node, None)
        if not said.client:
            self._simulated = sorted([*self._simulated, node])
            self._before = {client: self.num_examples.get(client) for client in said.counts} | self._before
            self.num_examples |= said.counts
        elif said.client in self._order:
            self._admit(grid, node, said)
        else:
            self._turn_away(grid, node, f"names '{said.client}', which is no client of this run")
        if self._real and self._simulated:
            self._leave_out_nameless(grid)

    def _admit(self, grid: Grid, node: int, said: Description) -> None:
        """Let a node claim the place of its client, where its key is bound to no other and its rank fits."""
        if wrong := self._keys.wrong(node, said.client):
            self._turn_away(grid, node, wrong)
            return
        if wrong := self._p.misfit(said.client, said.rank):
            self._misfits[node] = replace(said, trouble=f"which {wrong}")
            LOG.warning("node %d %s", node, wrong)
            self._questions.notify(grid, node, f"this node gets no work: it {wrong}")
            return
        if said.rank not in (None, self._p.rank, self._p.ranks.get(said.client)):
            self._p.say(f"{said.client}: its node has rank {said.rank}")
        self._ranks[node] = said.rank
        self._residents[said.client] = said.resident
        self._places.claim(node, said.client, said.counts[said.client])

    def _turn_away(self, grid: Grid, node: int, why: str) -> None:
        self._strangers[node] = why
        known = f"{', '.join(self.clients[:SHOWN])}{' …' if len(self.clients) > SHOWN else ''}"
        LOG.warning("node %d %s; known: %s", node, why, known)
        self._questions.notify(grid, node, f"this node gets no work: it {why}; known: {known}")

    def _leave_out_nameless(self, grid: Grid) -> None:
        """Give nodes that name no client no work beside some that do: they would train on what the server's configuration names.

        Raises:
            RunError: the run is private.
        """
        if self._p.private:
            raise RunError(
                "some nodes of this private run name the client they serve and some do not; start every one with "
                '--node-config \'client="…" data-path="…"\': one that is told what simulated nodes are takes its noise from the public seed'
            )
        for node in self._simulated:
            self._turn_away(grid, node, NAMELESS)
        self._simulated = []
        for client, count in self._before.items():
            if count is None:
                self.num_examples.pop(client, None)
            else:
                self.num_examples[client] = count
        self._before = {}

    def count_of(self, client: str, count: int) -> str:
        """Note how many examples a reply says that a client has; return what is wrong with that, if anything is."""
        known = self.num_examples.setdefault(client, count)
        if known == count:
            return ""
        if not self._p.replace_nodes:
            return changed("the client", count, known)
        self._places.remarks.append(f"{client}: it has {count} examples where there were {known}")
        self.num_examples[client] = count
        return ""

    def why(self, client: str) -> str:
        """Tell why no node serves a client."""
        refusing = [f"node {n}, {said.trouble}" for n, said in self._idle(self._troubled | self._misfits) if said.client == client]
        return "".join(refusing[:1]) or self._places.why(client) or (UNNAMED if self._silent() else "not connected")

    def _silent(self) -> list[tuple[int, float]]:
        """Return the nodes that are there and have not said anything yet, with the seconds since they were asked."""
        return [(node, seconds) for node, seconds in self._idle(self._questions.unanswered()) if node not in self._troubled]

    def _tell_who_holds(self) -> None:
        """Say where a worker holds an operator's limits, and where the app that came from here does; again if that changes."""
        here = {client: resident for client, resident in sorted(self._residents.items()) if self.node_of(client) is not None}
        for held, what in ((True, "held by a worker at"), (False, "advisory, for no worker answers, at")):
            names = [client for client, resident in here.items() if resident is held]
            if names and set(names) - self._told[held]:
                self._told[held] |= set(names)
                self._p.say(f"limits of operators: {what} {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}")

    def _idle(self, nodes: Mapping[int, Said]) -> list[tuple[int, Said]]:
        return [(node, said) for node, said in nodes.items() if node in self._online]

    def missing(self, clients: Sequence[str]) -> str:
        """Name the clients that nobody serves, each with the reason, and the nodes that are there and serve nobody or have not answered."""
        absent: dict[str, list[str]] = {}
        for client in clients:
            if self.node_of(client) is None:
                absent.setdefault(self.why(client), []).append(client)
        named = [f"{', '.join(some[:SHOWN])}{' …' if len(some) > SHOWN else ''} ({why})" for why, some in absent.items()]
        idle = [f"node {node} {why}" for node, why in self._idle(self._strangers)]
        idle += [
            f"node {node} is connected and fails to say whom it serves, and why its own log tells: {said.trouble}"
            for node, said in self._idle(self._troubled)
            if not said.client
        ]
        idle += [f"node {node} was asked and has not answered yet (for {seconds:.0f} s)" for node, seconds in self._silent()]
        return "; ".join([", ".join(named[:SHOWN]), *idle[:SHOWN]])
