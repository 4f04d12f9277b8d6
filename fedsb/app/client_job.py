"""One instruction to a client with everything it needs: configuration, model, data, frozen part, account and random streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from clients.round import PlainRound, Round, Upload
from fedsb.app.answering import data_path_of, hold, leave_unnoised, open_ledger
from fedsb.app.asked import asked_in, config_in, folder_of_run, is_real, own_folder
from fedsb.app.assembly import model_of, task_of
from fedsb.app.client_data import client_features
from fedsb.app.client_plans import asked_for, planned, planned_as_before
from fedsb.app.frozen_stores import store
from fedsb.app.ledger_rows import rows_of
from fedsb.app.own_factors import fresh_factors, made_factors, own_start
from fedsb.app.secure_desk import desk_for
from fedsb.app.threads import CORES, use_threads
from fedsb.config.compose import as_dict
from fedsb.config.derived import ranks_of
from fedsb.core.errors import RunError, UserError
from fedsb.core.folders import home
from fedsb.core.state import State, non_finite
from fedsb.models.fit import Site
from fedsb.node.own_part import own_labels
from fedsb.node.policy import admit_noise
from fedsb.node.reading import read_node
from fedsb.privacy.account import LEDGERS, Account, allowed
from fedsb.privacy.codes import StartDiffers
from fedsb.privacy.ledger import SIMULATION, Ledger
from fedsb.privacy.naming import client_folder
from fedsb.privacy.randomness import Streams, secret_streams, simulated_streams
from fedsb.privacy.replies import KEPT_ROUNDS, MOST_ROUNDS
from fedsb.privacy.shelf import Shelf
from fedsb.run.kept_start import KeptStart
from fedsb.run.own_state import OwnState, forget_old
from fedsb.run.resuming import fingerprint
from fedsb.wire.arrays import quantise
from fedsb.wire.cache_limits import Limits
from fedsb.wire.frozen import FrozenView
from fedsb.wire.messages import Instruction, decode_instruction, encode_reply
from fedsb.wire.rounded_uploads import Rounding
from fedsb.wire.short_states import received

# Folders of what clients keep for their next rounds: factors of their own, and what the wire has left out of their uploads.
OWN, LEFT = "own", "left"
NAMELESS = "nameless"  # whose frozen parts are, where a server names no run


class Job:
    """One instruction with everything it needs."""

    def __init__(self, message: Message, context: Context) -> None:
        self._context = context
        self.config = config_in(context)
        use_threads(self.config, most=CORES if is_real(context) else None)
        self.instruction: Instruction = decode_instruction(message.content)
        self.node = read_node(context.node_config)
        self.real = self.node is not None
        self.labels = own_labels(self.instruction.labels, self.node)
        self.data_path = data_path_of(context, self.instruction.client)
        leave_unnoised(context, self.config, self.instruction.labels)
        self.task = task_of(self.config)
        self.adapted = model_of(self.config, self.instruction.labels)
        if self.config.train.compile:
            from strategies import STRATEGIES  # and what servers need, for compiled training alone

            self.adapted.expect_growth(STRATEGIES[self.config.method.name].adds_to_weights())
        self.train, self.held_out = client_features(self.config, self.instruction.client, self.data_path, self.labels)
        hold(message, context, len(self.train))

    @cached_property
    def frozen(self) -> FrozenView:
        """The frozen part that the instruction is based on; what came with it is taken in when it is first asked for.

        Raises:
            StartDiffers: what everybody makes is not here what it is at the server.
        """
        return self._log.beside(self._made()) if self.adapted.spec.made else self._log

    @cached_property
    def _log(self) -> FrozenView:
        """What of the frozen part the server has sent."""
        i = self.instruction
        rank = self.rank if self.adapted.spec.in_log else None
        keeps = Limits(self.config.frozen.cache_days, self.config.frozen.cache_gb)
        # Of a run without a name too: a node takes no head for its content.
        owner = (i.origin or NAMELESS) if self.real else ""
        cached = store(self._cache / "frozen", rank, bool(self.adapted.held_as_factors), keeps, owner)
        return cached.take(i.bundle, i.frozen, i.origin, back=self.config.keep_checkpoints)

    def _made(self) -> State:
        """Return the factors that everybody makes, as the client's rank leaves them, held against the server's."""
        told, seed = self.instruction.start, self.config.seed
        made = made_factors(self.config, self.adapted, KeptStart(self._cache / "start.safetensors", told, seed) if self.real else None)
        if wrong := made.unlike(told):
            raise StartDiffers(
                f"the start of '{self.instruction.client}' differs from the server's by {wrong}; give it the same model, or use "
                "method=fed_sb, which sends its B and A"
            )
        return self.adapted.layouts.at(self.rank).sight.state(made.factors) if self.rank else made.factors

    @property
    def _cache(self) -> Path:
        return self.node.cache_folder if self.node else home()

    @cached_property
    def sent_down(self) -> State:
        """The state that the server sent, with what it left to be drawn."""
        layouts = self.adapted.layouts
        return received(self.instruction, layouts.at(self.rank).down, layouts.down, self.config.seed)

    @property
    def rank(self) -> int | None:
        """The client's own rank, as its node or the run says, or what it has become; None: that of the model."""
        own = (self.node.rank if self.node else None) or ranks_of(self.config).get(self.instruction.client)
        return min(filter(None, (own, self.instruction.rank)), default=None)

    @cached_property
    def own(self) -> State:
        """What the client brings itself: factors that it keeps, and those that begin anew in this round."""
        fresh, counted = fresh_factors(self.config, self.adapted, self.instruction.round, self.rank), self.instruction.own
        if not self.adapted.spec.own:
            return fresh
        return fresh.merge(self._own_state.of(counted) if counted else own_start(self.config, self.adapted, self.rank))

    def state(self) -> State:
        """Return what the client starts from, but for what it holds from the log."""
        return self.sent_down.merge(self.own)

    def shared_state(self) -> State:
        """Return what a client that has never trained would start from: its own part is as the start has it."""
        fresh = fresh_factors(self.config, self.adapted, self.instruction.round, self.rank)
        return self.sent_down.merge(fresh).merge(own_start(self.config, self.adapted, self.rank))

    def keep_own(self, own: State) -> None:
        """Keep what is the client's own.

        Raises:
            RunError: it is not finite, and would never be again: nothing is uploaded, and the client goes on from what it kept before.
        """
        if broken := non_finite(own):
            raise RunError(f"{broken.role} of '{broken.module}', which the client keeps for itself, holds NaN or infinity; lower train.lr")
        if len(own):
            self._own_state.save(self.instruction.round, own, since=self.instruction.own)

    def projected(self) -> Upload:
        """Return what the server asks for, in a second exchange, of what the client has trained in this round.

        It is a function of what was trained, and under privacy of what was noised and charged then.

        Raises:
            OwnStateLost: the client has not trained in this round, or what it kept of that is gone.
            UserError: the method has no such exchange.
        """
        spec, sketch = self.adapted.spec, self.adapted.spec.sketch
        if sketch is None:
            raise UserError(f"method '{self.config.method.name}' has no second exchange in a round, and the server asks for one")
        bases = self.instruction.state(self.adapted.layouts.at(self.rank).asked)
        trained = self._own_state.of(self.instruction.round)
        found = sketch.projections(spec, trained, bases, self.config.seed, self.instruction.round)
        dtype = self.config.federation.wire_dtype
        if dtype == "float32":
            return Upload(found, {})
        return Upload(found, {"encoding-error": self.adapted.scale * sketch.rounded(bases, found, quantise(found, dtype))})

    def keep_left(self, left: State) -> None:
        """Keep what the wire's rounding has left out of the client's uploads."""
        if len(left):
            self._states(LEFT).save(self.instruction.round, left, since=self.instruction.own)

    @cached_property
    def _own_state(self) -> OwnState:
        return self._states(OWN)

    def _states(self, kind: str) -> OwnState:
        """Return what is kept: in the run's folder in a simulation, in the node's own home, by the run, otherwise."""
        i = self.instruction
        if self.node is not None and self.node.cache.own_days is not None:
            forget_old(home() / kind, self.node.cache.own_days, i.origin)
        return OwnState(own_folder(self._context, self.config, kind, i.origin, i.client), self.config.keep_checkpoints)

    @property
    def _rounding(self) -> Rounding:
        """What becomes of the client's upload on its way.

        Raises:
            OwnStateLost: what was left out of its uploads is not here.
        """
        i, dtype = self.instruction, self.config.federation.wire_dtype
        carried = self._states(LEFT).of(i.own) if i.carried and i.own else State()
        carried = self.adapted.layouts.at(self.rank).sight.state(carried)  # it may be of the rank that the client had then
        return Rounding(dtype, lambda: self.frozen.basis.merge(self.sent_down), carried, i.carried)

    def site(self) -> Site:
        """Name the streams of this client and round."""
        i, c = self.instruction, self.config
        return Site(c.seed, i.client, i.round, c.federation.num_rounds)

    @cached_property
    def ledger(self) -> Ledger:
        """The client's ledger: in the run's folder in a simulation, and in the node's own home, named after the data, otherwise."""
        client = self.instruction.client
        if self.node is not None:
            shelf = Shelf(home() / LEDGERS)
            return open_ledger(shelf, self.node, rows_of(self.config, client, self.data_path, self.labels, shelf.salt))
        privacy = self.config.privacy
        header = {"unit": privacy.unit, "client": client, "privacy": as_dict(privacy), "run": fingerprint(self.config)}
        return Ledger(self._run_folder() / LEDGERS / client_folder(client), header)

    @cached_property
    def account(self) -> Account:
        """The client's plan in this run, and its ledger."""
        i, privacy, flower = self.instruction, self.config.privacy, str(self._context.run_id)
        common: dict[str, Any] = {
            "ledger": self.ledger,
            "accountant": privacy.accountant,
            "max_epsilon": privacy.max_epsilon,
            "request": i.asked,
            "rounds": min(max(KEPT_ROUNDS, self.config.keep_checkpoints), MOST_ROUNDS),
        }
        count = len(self.train)
        if not self.real:
            plan = planned(self.config, self._run_folder() / LEDGERS, i.client, count)
            return Account(plan=plan, run=SIMULATION, repeatable=True, **common)
        run = i.origin or flower  # a run that goes on has another number of Flower's
        asked = asked_for(asked_in(self._context), i.labels)
        plan = planned_as_before(self.config, self.ledger.folder, f"{run}/{i.client}", asked, i.client, count)
        if self.node is not None:
            admit_noise(self.node, *plan.multipliers)
        own = self.node.budgets(plan.delta) if self.node else ()
        return Account(plan=plan, run=run, names=(flower,), client=i.client, own=own, **common)

    def turn(self) -> AbstractContextManager[object]:
        """Keep other messages to the client in this run waiting, where its replies are charged for."""
        return self.account.turn() if self.config.privacy.unit == "example" else nullcontext()

    def _run_folder(self) -> Path:
        return folder_of_run(self._context, self.config)

    def streams(self, exchange: str) -> Streams:
        """Return the generators of noise and samples: nobody but a real node may be able to repeat them."""
        if self.real:
            return secret_streams(self.adapted.device)
        i = self.instruction
        return simulated_streams(self.config.seed, i.client, i.round, exchange, self.adapted.device)

    @cached_property
    def round(self) -> Round[Any]:
        """The round of training that is asked for."""
        return ROUNDS[self.config.privacy.unit](
            self,
            adapted=self.adapted,
            task=self.task,
            features=self.train,
            train=self.config.train,
            site=self.site(),
            frozen=lambda: self.frozen,
            keep_own=self.keep_own,
            keep_left=self.keep_left,
            rounding=self._rounding,
        )

    def reply(self, upload: Upload, *, wire_dtype: str | None = None) -> RecordDict:
        """Return the content of a reply; under example-level privacy nothing beside the account, in a secure sum masked."""
        metrics = allowed(upload.metrics) if self.config.privacy.unit == "example" else upload.metrics
        sent = self._masked(upload.sent) if self.config.federation.secure_sum else upload.sent
        return encode_reply(sent, len(self.train), metrics, wire_dtype or self.config.federation.wire_dtype)

    def _masked(self, sent: State) -> State:
        begun, desk = self.frozen.basis.merge(self.sent_down), desk_for(self._context, self.instruction)
        return desk.mask(sent, begun, len(self.train), self._log.content(self.adapted.held_as_factors))


def _plain_round(job: Job, **common: Any) -> Round[Any]:
    return PlainRound(**common)


def _private_round(job: Job, **common: Any) -> Round[Any]:
    # Opacus takes seconds to import, and most processes never need it.
    from clients.private_round import PrivateRound

    return PrivateRound(privacy=job.config.privacy, account=job.account, streams=job.streams("train"), **common)


# By privacy.unit: that of whole clients is the server's business.
ROUNDS: dict[str, Callable[..., Round[Any]]] = {"none": _plain_round, "client": _plain_round, "example": _private_round}
