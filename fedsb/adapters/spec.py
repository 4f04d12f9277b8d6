"""What an adapter family is, as data: the geometry of its factors, and what becomes of each of them in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsb.adapters.geometry import Shapes
from fedsb.adapters.sketched import Sketched
from fedsb.core.blocks import Block, leading
from fedsb.core.errors import UserError, check_options
from fedsb.core.state import HEAD, Layout, Name, State

ALWAYS: Literal["always"] = "always"
NEVER: Literal["never"] = "never"
Factors = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]
# From the pristine weights by module name, each (m, n), the rank and the seed to every factor of a family.
Start = Callable[[Weights, int, int], State]
# From a start's factors and s to those that the run begins with at this s.
Rescale = Callable[[State, float], State]
# From the leading SVD of a gradient, B (m, r), S (r,) and A (r, n) of each module, the kind of the first core, η and s to every factor.
FromGradient = Callable[[State, str, float, float], State]
# From the shapes of the factors to a module that has a parameter of each name, and maps (…, n) to the product (…, m) without s.
Build = Callable[[Shapes], nn.Module]
# From the factors of a module as a client ends a round with them to what it uploads in the place of one, in that one's shape.
Fold = Callable[[Factors], Tensor]


@dataclass(frozen=True)
class Role:
    """A factor of a family, or the head, and its life in a run.

    From it follow, round by round, what is trainable, what is sent and uploaded, what goes to the log, what stays at home and what is
    counted.

    Attributes:
        name: such as ``A``.
        learns: in every round, in none, or in one of the family's turns, from 0: in rounds t + 1, t + 1 + turns, …
        down: how a client comes by it: in the state of every round, in the log, which is sent once a version, not at all, or by the start,
            which everybody computes from W0 and the seed, so that nobody sends it.
        up: whether it is uploaded after a round in which it learnt, or what is uploaded in its place.
        kept_by: who remembers it from round to round; what nobody keeps begins anew in each.
        rest: what each entry is before anything is written to it. A factor that nobody keeps and that reaches the server folded into
            another begins each round so, and counts as that wherever nobody has just trained it.
    """

    name: str
    learns: Literal["always", "never"] | int = ALWAYS
    down: Literal["state", "log", "nothing", "start"] = "state"
    up: bool | Fold = True
    kept_by: Literal["server", "client", "nobody"] = "server"
    rest: float = 0.0


HEAD_ROLE = Role(HEAD)


def chain_shapes(m: int, n: int, rank: int) -> Shapes:
    """Return the shapes of LoRA-like factors: B is (m, r), R is (r, r), A is (r, n)."""
    return {"B": (m, rank), "R": (rank, rank), "A": (rank, n)}


def chain(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Split the product of a chain ``F_1 F_2 … F_k`` into ``U = F_1`` and ``V = F_2 … F_k``."""
    left, *rest = factors
    return left, reduce(torch.matmul, rest)


@dataclass(frozen=True)
class AdapterSpec:
    """Geometry of a family ``ΔW = s · U V`` and the life of its factors.

    Attributes:
        name: key in :data:`fedsb.adapters.SPECS`.
        roles: in product order, ``B A`` or ``B R A``; a family without any adapts no layer.
        starts: allowed values of ``init.kind``, the default first, with what makes the factors; None where it takes a gradient. Empty where
            there is nothing to start.
        shapes: of the factors, from m, n and the rank.
        split: from the factors in the order of the roles to ``U`` (m, ρ) and ``V`` (ρ, n), without s.
        build: a module with a forward of the family's own; None: ``nn.Linear`` factors one after the other where ``split`` is a chain, and
            ``x Vᵀ Uᵀ`` elsewhere.
        configure: from ``adapter.options``, its keyword arguments, to the spec; None where there is nothing to choose.
        head: the life of the head, which learns in every round.
        block: where a factor of a smaller rank lies in that of a larger one: what a client with a rank of its own sees, and sends, of it.
        from_gradient: makes the factors of the start that takes a gradient, where there is one.
        reach: from the rank to the least that min(m, n) of an adapted matrix must be.
        shifting: starts whose product is taken out of W0, by version 1 of the log, so that the run begins at W0; with what s makes of them.
        mask: frozen factors (m, q) and (q, n); all that is added to W0 is under their product, entry by entry.
        sketch: how the products of what was trained reach the server in two exchanges, in the place of the factors.

    Raises:
        ValueError: no run can lead such a life.
    """

    name: str
    roles: tuple[Role, ...] = ()
    starts: Mapping[str, Start | None] = field(default_factory=dict)
    shapes: Callable[[int, int, int], Shapes] = chain_shapes
    split: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]] = chain
    build: Build | None = None
    configure: Callable[..., AdapterSpec] | None = None
    head: Role = HEAD_ROLE
    block: Block = leading
    from_gradient: FromGradient | None = None
    reach: Callable[[int], int] = int
    shifting: Mapping[str, Rescale] = field(default_factory=dict)
    mask: tuple[str, str] | None = None
    sketch: Sketched | None = None

    def __post_init__(self) -> None:
        for role in (*self.roles, self.head):
            if wrong := _wrong_with(role):
                raise ValueError(f"family '{self.name}': {role.name} {wrong}")
        if (None in self.starts.values()) != (self.from_gradient is not None):
            raise ValueError(f"family '{self.name}': a start that takes a gradient and what makes factors of it go together")
        if self.made and None in self.starts.values():
            made = ", ".join(self.made)
            raise ValueError(f"family '{self.name}': everybody makes {made}, and a start takes a gradient, which nobody has alone")
        if self.mask is not None and (self.shifting or not {*self.mask} <= {*self.in_log} & {*self.frozen}):
            raise ValueError(f"family '{self.name}': what masks W0's gain rests, comes in the log and masks nothing that a start adds")
        if self.sketch is not None and (self.own or self.in_log or self.folded or self.shifting or self.turns > 1):
            raise ValueError(f"family '{self.name}': what reaches the server by sketches is sent down whole in every round")
        if self.head.learns != ALWAYS or self.head.down == "log" or self.head.kept_by == "nobody" or callable(self.head.up):
            raise ValueError(f"family '{self.name}': the head learns in every round, is sent or kept by its client, and goes up as it is")

    def having(self, options: Mapping[str, Any]) -> AdapterSpec:
        """Return the family as ``adapter.options`` ask for it.

        Raises:
            UserError: it has no such options, or not these values.
        """
        if not options:
            return self
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        check_options(
            "adapter.options", f"the family '{self.name}'", options, signature(self.configure).parameters if self.configure else ()
        )
        assert self.configure is not None
        try:
            return self.configure(**options)
        except TypeError as error:
            raise UserError(f"the family '{self.name}' does not take these adapter.options ({given}): {error}") from None

    def shift(self, factors: State, scale: float) -> State:
        """Return what takes the product of some factors out of W0: ``U`` (m, ρ) and ``V`` (ρ, n) of each module."""
        tensors: dict[Name, Tensor] = {}
        for module in {name.module: None for name in factors if name.role in self.factors}:
            left, right = self.split(tuple(factors[Name(module, role)] for role in self.factors))
            tensors |= {Name(module, "U"): -scale * left, Name(module, "V"): right}
        return State(tensors)

    @property
    def is_chain(self) -> bool:
        """Whether the layer is a row of ``nn.Linear`` factors."""
        return self.build is None and self.split is chain

    def shape(self, role: str, out_features: int, in_features: int, rank: int) -> tuple[int, ...]:
        """Return the shape of a factor."""
        return self.shapes(out_features, in_features, rank)[role]

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors in product order."""
        return tuple(role.name for role in self.roles)

    @property
    def turns(self) -> int:
        """Number of turns in which factors learn; 1 where all that learn do so in every round."""
        return 1 + max((role.learns for role in self.roles if isinstance(role.learns, int)), default=0)

    def learn(self, round_number: int) -> tuple[str, ...]:
        """Return the factors that learn in a round, from 1."""
        turn = (round_number - 1) % self.turns
        return tuple(role.name for role in self.roles if role.learns in (ALWAYS, turn))

    @property
    def ever_learn(self) -> tuple[str, ...]:
        """The factors that learn in some round."""
        return tuple(role.name for role in self.roles if role.learns != NEVER)

    def uploaded(self, round_number: int) -> tuple[str, ...]:
        """Return the factors that a client uploads after a round."""
        learnt = self.learn(round_number)
        return tuple(role.name for role in self.roles if role.up and role.name in learnt)

    @property
    def uploads(self) -> bool:
        """Whether anything is uploaded in any round."""
        return bool(self.head.up) or any(self.uploaded(turn) for turn in range(1, self.turns + 1))

    @property
    def in_state(self) -> tuple[str, ...]:
        """The factors that are sent down in every round."""
        return self._where(lambda role: role.down == "state")

    @property
    def in_log(self) -> tuple[str, ...]:
        """The factors that clients hold from the log."""
        return self._where(lambda role: role.down == "log")

    @property
    def made(self) -> tuple[str, ...]:
        """The factors that server and clients each compute from W0 and the seed, and nobody sends."""
        return self._where(lambda role: role.down == "start")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The factors that clients hold from the log or the start and nobody ever trains: they need no copy."""
        return self._where(lambda role: role.down in ("log", "start") and role.learns == NEVER)

    @property
    def own(self) -> tuple[str, ...]:
        """The factors that each client keeps for itself, and the head where it does."""
        return tuple(role.name for role in (*self.roles, self.head) if role.kept_by == "client")

    @property
    def fresh(self) -> tuple[str, ...]:
        """The factors that begin anew in each round, as the start draws them from the seed and the round; :attr:`folded` ones rest."""
        return self._where(lambda role: role.kept_by == "nobody" and bool(role.up))

    @property
    def has_global_model(self) -> bool:
        """Whether the server holds a whole model: nothing of it is a client's own."""
        return not self.own

    @property
    def folded(self) -> tuple[str, ...]:
        """The factors that begin anew in each round and reach the server in another one's upload only."""
        return self._where(lambda role: role.kept_by == "nobody" and not role.up)

    def at_rest(self, layout: Layout) -> State:
        """Return those of a layout's factors that are :attr:`folded` as each round finds them."""
        rest = {role.name: role.rest for role in self.roles if role.name in self.folded}
        return State({name: torch.full(shape, rest[name.role]) for name, shape in layout.shapes if name.role in rest})

    def fold(self, trained: State) -> State:
        """Return what a client has trained as the server is to see it: what is folded into another's upload is there, and nowhere else."""
        made = {
            Name(module, role.name): role.up({name.role: t for name, t in trained.items() if name.module == module})
            for role in self.roles
            if callable(role.up)
            for module in sorted({name.module for name in trained if name.role == role.name})
        }
        return State({name: made.get(name, t) for name, t in trained.items() if name.role not in self.folded})

    def _where(self, holds: Callable[[Role], bool]) -> tuple[str, ...]:
        return tuple(role.name for role in self.roles if holds(role))


def _wrong_with(role: Role) -> str:
    """Say why no run can lead a role's life; nothing where one can."""
    kept, sent = role.kept_by == "server", role.down != "nothing"
    if role.down == "start" and role.learns != NEVER:
        return "is made by everybody at the start, and learns: it would be another one for everybody"
    if kept != sent:
        return f"is kept by {role.kept_by} and comes down in {role.down}: what the server keeps it sends, and nothing else"
    if kept and role.learns != NEVER and not role.up:
        return "learns, is kept by the server, and does not go up: its training would be lost"
    if role.kept_by == "client" and (role.up or isinstance(role.learns, int)):
        return "is kept by its client, and goes up or learns in turns: the state of a round in which it rests would be nobody's"
    return ""
