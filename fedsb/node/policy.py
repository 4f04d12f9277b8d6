"""What the operator of a node allows: a table of what is held against a request, before data are read and again once they are counted.

A run's configuration comes from the server; what is held against it here does not. It stops a server that forgot ``privacy=…`` or asks for
too much, as long as the app that the server ships is this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsb.node import rules
from fedsb.node.request import PolicyError, Request
from fedsb.node.rules import Broken, most
from fedsb.node.settings import NodeConfig


@dataclass(frozen=True)
class Rule:
    """One thing that an operator may say.

    Attributes:
        key: of ``node.yaml``; how its value is read and what it may be stands in :data:`fedsb.node.values.VALUES`.
        broken: the line that says how a request breaks it, which begins with a key of the run; None where it is kept, or was not said.
        code: key of :data:`fedsb.privacy.codes.CODES` that the refusal travels as.
    """

    key: str
    broken: Broken
    code: str = "policy"


RULES: tuple[Rule, ...] = (
    Rule("data.path", rules.packaged),
    Rule("data.text", rules.columns),
    Rule("data.labels", rules.labels),
    Rule("privacy.unit", rules.unit),
    Rule("privacy.min_noise", rules.noise),
    Rule("privacy.max_epsilon", rules.epsilon("max_epsilon")),
    Rule("privacy.max_epsilon_run", rules.epsilon("max_epsilon_run")),
    Rule("privacy.max_grad_norm", rules.norm),
    Rule("evaluate", rules.evaluation),
    Rule("secure.required", rules.secured),
    Rule("secure.min_clients", rules.summed),
    Rule("methods", rules.method),
    Rule("limits.max_local_epochs", most("max_local_epochs", "passes", lambda r: r.epochs)),
    Rule("limits.max_local_steps", most("max_local_steps", "steps", lambda r: r.steps)),
    Rule("limits.max_examples_per_round", most("max_examples_per_round", "examples a round", lambda r: r.examples)),
    Rule("limits.max_examples_per_round", most("max_examples_per_round", "examples of evidence", rules.evidence, "init.num_examples")),
    Rule("models", rules.model, "model"),  # the last, as a large one takes long to read
)


def admit(node: NodeConfig, request: Request) -> None:
    """Hold a request against everything that the operator has said.

    Raises:
        PolicyError: the first thing that the operator does not allow.
    """
    for rule in RULES:
        if line := rule.broken(node, request):
            raise PolicyError(line, code=rule.code)


def admit_noise(node: NodeConfig, *multipliers: float | None) -> None:
    """Hold noise multipliers that follow from a run's epsilon, those that are known, against the least that the operator allows.

    Raises:
        PolicyError: one is smaller.
    """
    if line := rules.too_quiet(node, *multipliers):
        raise PolicyError(line)
