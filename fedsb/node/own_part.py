"""What is the node's own in a run, whatever the run says: its data and how they are written, its device, its disk, where its models lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedsb.config.schema import Config, DataConfig, ModelConfig
from fedsb.data.tables import named_columns
from fedsb.data.templates import form_of, forms_of
from fedsb.node.settings import NodeConfig, OwnData

COLUMNS = ("text", "label", "prompt", "response", "messages", "choices")
WRITTEN = ("template", "system")  # texts with places for columns
OF_FILE = ("encoding", "train_split")


def with_own(config: Config, node: NodeConfig) -> Config:
    """Return a run's configuration with what is the node's own in the place of what the run says.

    A run says of which kinds of columns an example is made; how they are called, the node says, where it does.
    """
    given: dict[str, Any] = {"cache_gb": node.cache.gb, "cache_days": node.cache.days}
    model = own_model(config.model, node)
    return replace(
        config,
        device=node.device or config.device,
        data=own_data(config.data, node),
        model=replace(model, device_map=None) if node.device and ":" in node.device else model,  # one card, and no other
        frozen=replace(config.frozen, **{key: value for key, value in given.items() if value is not None}),
    )


def own_data(data: DataConfig, node: NodeConfig) -> DataConfig:
    """Return what a run says of its data with the node's own names and held-out part; of no path of the server's anything is read."""
    own = node.data
    said: dict[str, Any] = {key: getattr(own, key) for key in (*COLUMNS, *WRITTEN, *OF_FILE) if getattr(own, key) is not None}
    asked = {key: value for key, value in said.items() if key in ("label", *OF_FILE) or getattr(data, key) is not None}
    served = {"path": None, "test_path": own.test_path, "public_path": None, "validation_path": None}
    paths: dict[str, Any] = {} if node.data_path is None else served
    share = 0.0 if own.test_path is not None else own.test_fraction
    return replace(data, **asked, **paths, client_test_fraction=data.client_test_fraction if share is None else share)


def own_model(model: ModelConfig, node: NodeConfig) -> ModelConfig:
    """Return the model that a run names, at its place on this machine where the node has said one."""
    own = node.model(model.name)
    if own is None or own.path is None:
        return model
    return replace(model, kind="pretrained", name=own.path, path=None, revision=None, config={})


def own_labels(labels: tuple[str, ...], node: NodeConfig | None) -> tuple[str, ...]:
    """Return the classes of a run, in its order, as the node's data name them."""
    if node is None or not isinstance(node.data.labels, dict):
        return labels
    return tuple(node.data.labels.get(label, label) for label in labels)


def foreign_columns(data: DataConfig, node: NodeConfig) -> Mapping[str, str]:
    """Return the columns that a run would read beside those that the node names, by the key that names them; none where it names none."""
    allowed = set(_columns(node.data))
    if not any(getattr(node.data, key) is not None for key in COLUMNS):
        return {}
    after = own_data(data, node)
    wanted = named_columns(after)
    found = {key: column for key in (*COLUMNS, *WRITTEN) for column in _named_by(after, key) if column in wanted - allowed}
    return {f"data.{key}": column for key, column in found.items()}


def _columns(own: OwnData) -> Iterator[str]:
    for key in (*COLUMNS, *WRITTEN):
        yield from _named_by(own, key)


def _named_by(data: DataConfig | OwnData, key: str) -> tuple[str, ...]:
    value = getattr(data, key)
    if value is None:
        return ()
    if key == "template":
        return tuple(column for form in forms_of(value) for column in form.columns)
    if key == "system":
        return form_of(value, "data.system").columns
    return (value,) if isinstance(value, str) else tuple(value)
