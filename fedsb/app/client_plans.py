"""A client's plan in a run, kept beside its ledger: a message may have a process of its own, and calibrating takes seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedsb.app.private_run import add_plan, plan_of, saved_plan
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.privacy.first_asked import asks_as_before
from fedsb.privacy.plan import Plan
from fedsb.run.resuming import DATA_PATHS, fingerprint


def asked_for(config: Config, labels: Sequence[str]) -> str:
    """Return a hash of what the server asks a real node for, labels included: all messages of a run ask for the same."""
    classes = hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:8]
    # Data are the node's own, and relative paths begin where it was started: elsewhere, perhaps, when the run goes on.
    return f"/{fingerprint(config, without=DATA_PATHS)}-{classes}"


def planned(config: Config, folder: Path, client: str, count: int) -> Plan:
    """Return the plan of a simulated client with so many examples, which lies in ``folder`` if the server has left it there."""
    plan = saved_plan(folder, client)
    return plan if plan is not None and plan.num_examples == count else plan_of(config, client, count)


def planned_as_before(config: Config, folder: Path, run: str, asked: str, client: str, count: int) -> Plan:
    """Return a real client's plan, and leave it beside its ledger.

    Args:
        config: of the run, at this node.
        folder: of the ledger.
        run: names the run, and the client.
        asked: by :func:`asked_for`.
        client: the client.
        count: its examples.

    Raises:
        UserError: the run asked for something else before.
    """
    if not asks_as_before(folder, run, asked):
        # Its first messages were checked, planned and held against the limits, and these were not.
        raise UserError("the configuration or the labels of this run are not those of its earlier messages; submit another run")
    plan = saved_plan(folder, run + asked)
    if plan is None or plan.num_examples != count:
        plan = plan_of(config, client, count)
        add_plan(folder, run + asked, plan)
    return plan
