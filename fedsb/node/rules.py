"""The rules of the table in :mod:`fedsb.node.policy`: each returns the line that says how a request breaks it, or None.

A line begins with the key of the run's configuration that is at fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from fedsb.config.derived import must_stay, start_kind
from fedsb.models.content import content_hash
from fedsb.models.loading import place_of
from fedsb.node.own_part import foreign_columns, own_model
from fedsb.node.request import Request
from fedsb.node.settings import PACKAGE, NodeConfig

PACKAGED = "bbc_news"
Broken = Callable[[NodeConfig, Request], str | None]


def packaged(node: NodeConfig, request: Request) -> str | None:
    """A node whose data ship in a package reads no file: by its answer it would tell what its disk holds."""
    data = request.config.data
    if node.data_path is not None:
        return None
    if data.kind != PACKAGED:
        return f"data.kind={data.kind}: the data path of this node is '{PACKAGE}', so it serves data={PACKAGED} alone"
    key = next((key for key in ("path", "test_path", "public_path", "validation_path") if getattr(data, key) is not None), None)
    return key and f"data.{key}: the data path of this node is '{PACKAGE}', and it reads no other; leave data.{key} out"


def columns(node: NodeConfig, request: Request) -> str | None:
    """A node that names its columns has no others read."""
    asked, own = request.config.data.text, node.data.text
    if asked is not None and own is not None and isinstance(asked, str) != isinstance(own, str):
        return f"data.text={asked}: this node reads {own}, and a pair of columns is not one"
    found = foreign_columns(request.config.data, node)
    return next((f"{key}: this node names its columns, and none for the run's '{column}'" for key, column in found.items()), None)


def labels(node: NodeConfig, request: Request) -> str | None:
    """The classes of a run are those that the operator has named: else a refusal for an unknown label would tell which there are."""
    own, config = node.data.labels, request.config
    if own is None or (config.model.task or config.data.task) != "classification" or {*own} == {*request.labels}:
        return None
    return f"data.labels=[{', '.join(request.labels)}]: the classes of this node's data are {', '.join(own)}"


def unit(node: NodeConfig, request: Request) -> str | None:
    """A node that has named a unit answers nothing else, and nothing without noise."""
    privacy, own = request.config.privacy, node.privacy.unit
    if own is None:
        return None
    if privacy.unit != own:
        return f"privacy.unit={privacy.unit}: this node answers privacy={own} alone"
    if request.unnoised is not None:
        return f"privacy.init_fraction={privacy.init_fraction:g}: this node gives nothing without noise ({request.unnoised})"
    return None


def too_quiet(node: NodeConfig, *multipliers: float | None) -> str | None:
    """Hold noise multipliers, those that are known, against the least that the operator allows."""
    least = min((noise for noise in multipliers if noise is not None), default=math.inf)
    if node.privacy.min_noise is None or least >= node.privacy.min_noise:
        return None
    return f"privacy.noise_multiplier={least:g}: this node's min_noise is {node.privacy.min_noise:g}"


def noise(node: NodeConfig, request: Request) -> str | None:
    """Hold the noise that a run gives; one that follows from its epsilon is held when it is known."""
    return too_quiet(node, request.config.privacy.noise_multiplier)


def epsilon(name: str) -> Broken:
    """Of a target no smaller δ makes less; one that fits is charged against the same budget, release by release."""

    def broken(node: NodeConfig, request: Request) -> str | None:
        limit, asked = getattr(node.privacy, name), request.config.privacy.epsilon
        return None if limit is None or asked is None or asked <= limit else f"privacy.epsilon={asked:g}: this node's {name} is {limit:g}"

    return broken


def norm(node: NodeConfig, request: Request) -> str | None:
    """The norm that an example is clipped to, and with it the size of the noise, has a bound."""
    privacy, most = request.config.privacy, node.privacy.max_grad_norm
    if most is None:
        return None
    if privacy.clipping == "adaptive":
        return f"privacy.clipping=adaptive: this node's max_grad_norm is {most:g}, and an adaptive one goes where the gradients are"
    norms = {"max_grad_norm": privacy.max_grad_norm, "init_norm": privacy.init_norm if privacy.init_fraction else 0.0}
    return next((f"privacy.{key}={norm:g}: this node's max_grad_norm is {most:g}" for key, norm in norms.items() if norm > most), None)


def evaluation(node: NodeConfig, request: Request) -> str | None:
    """A node that evaluates nothing still trains: of the run it is the messages that ask for metrics that are refused."""
    return "federation.evaluate_clients=true: this node evaluates nothing" if request.evaluation and not node.evaluate else None


def secured(node: NodeConfig, request: Request) -> str | None:
    """A node may ask that no server sees its upload."""
    if not node.secure.required or request.config.federation.secure_sum:
        return None
    return "federation.secure_sum=false: this node gives its part to secure sums alone"


def summed(node: NodeConfig, request: Request) -> str | None:
    """A sum over few clients tells much of each: a node may ask for more than a run would have stay."""
    least = node.secure.min_clients
    if least is None or not request.config.federation.secure_sum or (stay := must_stay(request.config)) >= least:
        return None
    return f"federation.num_clients: a sum of this run may be over {stay} clients, and this node's min_clients is {least}"


def method(node: NodeConfig, request: Request) -> str | None:
    """A method is one that the operator has named."""
    name = request.config.method.name
    return None if node.methods is None or name in node.methods else f"method.name={name}: this node runs {', '.join(node.methods)}"


def model(node: NodeConfig, request: Request) -> str | None:
    """Hold a model's name and content; of what it is loaded with nothing may come from elsewhere."""
    asked = request.config.model
    if node.models is None:
        return None
    own = node.model(asked.name)
    if own is None:
        return f"model.name={asked.name}: this node has {', '.join(model.name for model in node.models)}"
    if asked.kind == "config":
        return f"model.kind=config: its weights are in no file, and this node has '{own.name}' by its content"
    for key in ("tokenizer", "attn_implementation"):
        value = getattr(asked, key)
        if value is not None and (key == "tokenizer" or "/" in value):
            return f"model.{key}={value}: this node takes nothing for '{own.name}' that is not of its content; leave model.{key} out"
    place = Path(place_of(own_model(asked, node)))
    if not place.exists():
        return f"model.name={asked.name}: it is no folder of this machine; add its path to models"
    found = content_hash(place, node.cache_folder)
    return None if found == own.sha256 else f"model.name={asked.name}: the content of '{place}' is {found}, and models has {own.sha256}"


def most(name: str, noun: str, measured: Callable[[Request], float | None], key: str = "") -> Broken:
    """Return a rule of an upper limit on a figure that may not be known yet.

    Args:
        name: of the limit.
        noun: what is counted.
        measured: gives the figure; None while it is not known.
        key: of the run's configuration that it follows from; that of the length of a round by default.
    """

    def broken(node: NodeConfig, request: Request) -> str | None:
        limit, found = getattr(node.limits, name), measured(request)
        if limit is None or found is None or found <= limit:
            return None
        at_fault = key or ("train.local_epochs" if request.config.train.local_steps is None else "train.local_steps")
        of = "" if request.count is None else f" of {request.count} examples"
        return f"{at_fault}: {found:g} {noun}{of}, and this node's {name} is {limit:g}"

    return broken


def evidence(request: Request) -> int | None:
    """Return how many examples an exchange of the start reads; None where it reads none, or where that is not known yet."""
    config = request.config
    if start_kind(config) != "gradient" or config.init.evidence != "clients" or request.count is None:
        return None
    return min(config.init.num_examples, request.count)
