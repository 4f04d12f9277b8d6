"""What a client may say when it does not answer: a number out of this table and a key of the configuration, never text.

Text can carry data: a real node says no more under any privacy, a simulated client under ``privacy=example`` and ``privacy=client``. That a
client answers by a code is not noised. What stops a run (11 to 20) is a fault of code or model that every client has alike: where there
is none no data fail a check.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsb.core.errors import UserError


@dataclass(frozen=True)
class Code:
    """One way not to answer.

    Attributes:
        number: as it travels.
        text: what the server shows.
        stops: whether the run must not go on.
    """

    number: int
    text: str
    stops: bool = False


CODES: dict[str, Code] = {
    "failed": Code(1, "the client failed; its own log says why"),
    "budget": Code(2, "refused: the request would exceed the client's budget (privacy.max_epsilon, or max_epsilon of its node)"),
    "refused": Code(3, "refused: the request does not fit the client's data or ledger; its own log says why"),
    "policy": Code(4, "refused: the operator of the node does not allow what the run asks for; its own log says why"),
    "node_config": Code(5, "the node's own configuration (--node-config, or the file that it names) cannot be used; its own log says why"),
    "own_state": Code(
        6,
        "refused: what the client kept of its own in its last round that counted is not there; bring its disk back (FEDSB_HOME of its "
        "node, the folder own/ of a simulated run), or let such clients begin anew by federation.lost_state=anew",
    ),
    "start": Code(
        7,
        "refused: the client's start differs from the server's; give it the same model, or use method=fed_sb, which sends its B and A; its "
        "own log says by how much",
    ),
    "model": Code(8, "refused: the node has no model of that name and content; its own log says what it has"),
    "time": Code(9, "the node ended the message: it took longer than its operator allows, and what was charged stays charged"),
    "worker": Code(
        10,
        "the node's worker is not there, or died over the message; its supervisor starts it again, what was charged stays charged, and "
        "the node's own log says why",
    ),
    "clipped_sum": Code(11, "self-check: the clipped sum before noise is zero for a trained tensor", stops=True),
    "dependence": Code(12, "self-check: the model's output does not depend on every trained tensor", stops=True),
    "base": Code(13, "self-check: a frozen weight moved", stops=True),
    "steps": Code(14, "self-check: optimiser steps, noised sums and ledger entries differ in number", stops=True),
    "sampler": Code(15, "self-check: the sampler is not Poisson at the charged rate", stops=True),
    "examples": Code(16, "self-check: a trained layer does not see one example a row, so gradients cannot be told apart", stops=True),
    "company": Code(17, "self-check: another example changes an example's output or gradient", stops=True),
    "hooks": Code(18, "self-check: a trained layer's hooks give a wrong gradient; set privacy.grad_sample_mode=functorch", stops=True),
    "bound": Code(19, "self-check: an example counts for more than the norm that it is clipped to", stops=True),
    "noise": Code(20, "self-check: a tensor has less noise than was charged, or two steps have the same", stops=True),
    "version": Code(21, "the node's worker is of another version of fedsb than the app that came from here; install one on both sides"),
    "secure": Code(22, "refused: what is asked for does not fit the secure sum that the client has begun; its own log says why"),
    "unsigned": Code(23, "refused: the keys of another client are not signed by the key that the node knows for it (secure.peers)"),
    "layout": Code(
        24,
        "the client's model, adapter.targets or rank is not the server's, or its fedsb of another version: what came is of another layout; "
        "its own log says which it has",
    ),
    "flower": Code(25, "the node's Flower is of another minor release than the server's; install one on both sides (its own log has both)"),
}
BY_NUMBER: dict[int, Code] = {code.number: code for code in CODES.values()}
UNKNOWN = Code(0, "the client answered with a code that this version does not know")


class BudgetExceeded(RuntimeError):
    """A charge that the limit does not allow: nothing was written, and nothing may be computed."""


class OwnStateLost(RuntimeError):
    """A client lacks what it kept of its own, and does not go on from anything else."""


class StartDiffers(UserError):
    """A client has computed another start than the server: its factors would not go with anybody else's."""


class SelfCheckFailed(RuntimeError):
    """Private training is not what the ledger says it is.

    Args:
        check: key of :data:`CODES`.
    """

    def __init__(self, check: str) -> None:
        super().__init__(CODES[check].text)
        self.code = CODES[check]
