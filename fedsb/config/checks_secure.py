"""What secure sums go together with; whether a method's sum alone is enough is the method's to say (:mod:`strategies.combinations`)."""

from __future__ import annotations

from collections.abc import Callable

from fedsb.config.derived import family, start_kind
from fedsb.config.largest_change import largest_change
from fedsb.config.schema import Config
from fedsb.core.cohort import cohort_size
from fedsb.core.errors import UserError
from fedsb.secure.threshold import LEAST

ON = "federation.secure_sum=true"
MOST_CUTOFF = 50  # of fedau: how many times another a client may count, on the server's word
Clash = tuple[str, Callable[[Config], bool], str]

# The setting that does not go with it, whether it is set, and why and what to change.
CLASHES: tuple[Clash, ...] = (
    (
        "federation.exactness=true",
        lambda c: c.federation.exactness,
        "the gap is measured from single uploads, which nobody sees; set federation.exactness=false: the sum's rounding is recorded then",
    ),
    (
        "privacy.unit=client",
        lambda c: c.privacy.unit == "client",
        "the server clips each client's upload, and would see none; use privacy=example, whose noise is the clients' own, or no secure sum",
    ),
    (
        "federation.wire_dtype",
        lambda c: c.federation.wire_dtype != "float32",
        "a masked value takes four bytes whatever the wire, and what rounding left out of an upload is nobody's to add up; "
        "use federation.wire_dtype=float32",
    ),
    (
        "init.kind=gradient",
        lambda c: start_kind(c) == "gradient" and c.init.evidence == "clients",
        "the start would show the server each client's mean gradient on some random directions, without a mask; use init.kind=orthogonal, "
        "another start that asks no client, or init.evidence=public",
    ),
    (
        "federation.cutoff",
        lambda c: c.federation.weighting == "fedau" and c.federation.cutoff > MOST_CUTOFF,
        f"a client may count that many times another with federation.weighting=fedau, and of a sum nearly all is its upload; give at most "
        f"{MOST_CUTOFF}",
    ),
    (
        "train.local_steps=1",
        lambda c: c.train.local_steps == 1 and c.privacy.unit != "example" and bool(family(c).own),
        "the first step of a client that begins anew in a factor of its own changes nothing that it uploads, and the sum would be "
        "another's upload; take two steps, or a method whose clients keep nothing for themselves",
    ),
    ("faults.nan", lambda c: c.faults.nan > 0, "nobody could see what was broken under its mask; leave faults.nan out"),
)


def _clashes(config: Config) -> None:
    if not config.federation.secure_sum:
        return
    for name, holds, why in CLASHES:
        if holds(config):
            raise UserError(f"{ON} with {name}: {why}", key=name.partition("=")[0])


def _several_are_summed(config: Config) -> None:
    f = config.federation
    if f.secure_sum and f.num_clients and (drawn := cohort_size(f.num_clients, f.fraction)) < LEAST:
        raise UserError(f"{ON} with a round of {drawn} client: its sum is its upload; draw at least {LEAST} clients a round")


def _changes_are_bounded(config: Config) -> None:
    f, spec = config.federation, family(config)
    if not f.secure_sum or f.secure_bound is not None:
        return
    bound = "give federation.secure_bound=0.1, say (what is beyond it is cut, and counted)"
    up = {role for turn in range(1, spec.turns + 1) for role in spec.uploaded(turn)}
    if odd := [role.name for role in spec.roles if role.name in up and (callable(role.up) or role.name in spec.fresh)]:
        raise UserError(
            f"{ON} with method '{config.method.name}': its {', '.join(odd)} is uploaded with another factor in it, or begins anew in each "
            f"round, and no step of the optimiser bounds it; {bound}"
        )
    if largest_change(config.train, config.privacy, 1) is None:
        raise UserError(
            f"{ON}: nothing bounds by how much train.optimizer={config.train.optimizer} changes a value in a round here; {bound}, or "
            "train.clip_norm with sgd, or use adamw without train.weight_decay"
        )


SECURE_RULES: tuple[Callable[[Config], None], ...] = (_clashes, _several_are_summed, _changes_are_bounded)
