"""What the operator of a node has said of it, typed: the same object whether it stands in ``node.yaml`` or in ``--node-config``.

None allows what a run asks for, or leaves it to the run.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass

from fedsb.config.schema import STRICT, Words
from fedsb.core.folders import home
from fedsb.privacy.limit import Limit

PACKAGE = "package"  # the path of a node whose data ship in a package


@dataclass(frozen=True, config=STRICT)
class OwnData:
    """A client's own data.

    Attributes:
        path: a file or folder, or :data:`PACKAGE`.
        text, label, prompt, response, messages, choices: columns as they are called here, in place of those that a run names. Where any is
            given a run reads no column beside them.
        template, system: in place of the run's.
        encoding, train_split: likewise, of the file.
        labels: the classes of a run by their names here; a list where these are the same.
        test_path: a file or folder with the client's held-out part; all of ``path`` is trained on then.
        test_fraction: the share of ``path`` that is held out, in place of the run's.
    """

    path: str
    text: Words | None = None
    label: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    choices: str | None = None
    template: str | None = None
    system: str | None = None
    encoding: str | None = None
    train_split: str | None = None
    labels: dict[str, str] | tuple[str, ...] | None = None
    test_path: str | None = None
    test_fraction: float | None = None


@dataclass(frozen=True, config=STRICT)
class Cache:
    """What is kept on the node's disk.

    Attributes:
        folder: where what can be made or sent again lies; None: ``FEDSB_HOME``.
        gb: of frozen parts, at most.
        days: since a frozen part was used.
        own_days: since a run has used what the client keeps of its own in it; None keeps that for good.
    """

    folder: str | None = None
    gb: float | None = None
    days: float | None = None
    own_days: float | None = None


@dataclass(frozen=True, config=STRICT)
class OwnPrivacy:
    """What is answered and what it may cost.

    Attributes:
        unit: the only one that is answered.
        min_noise: the smallest noise multiplier of a release.
        max_epsilon: of the whole ledger.
        max_epsilon_run: of one run's releases.
        max_delta: the largest δ at which both are judged.
        max_grad_norm: the largest norm that an example's gradient, or its sketch, is clipped to.
        ledger: a name for the ledger in place of where the data lie.
    """

    unit: str | None = None
    min_noise: float | None = None
    max_epsilon: float | None = None
    max_epsilon_run: float | None = None
    max_delta: float | None = None
    max_grad_norm: float | None = None
    ledger: str | None = None


@dataclass(frozen=True, config=STRICT)
class OwnModel:
    """A model that a run may name: what it is called there, its content (:mod:`fedsb.models.content`), and where it lies here."""

    name: str
    sha256: str | None = None
    path: str | None = None


@dataclass(frozen=True, config=STRICT)
class OwnSecure:
    """How the node takes part in secure sums.

    Attributes:
        required: whether nothing is answered but in runs with ``federation.secure_sum=true``.
        key: file of the node's private key, which signs what it advertises.
        peers: file of the other nodes' public keys, by their clients; keys that are not signed by them are refused.
        min_clients: of a sum, whatever dropouts a run allows; None: what the run asks for.
    """

    required: bool = False
    key: str | None = None
    peers: str | None = None
    min_clients: int | None = None


@dataclass(frozen=True, config=STRICT)
class Limits:
    """How much one message may ask for.

    Attributes:
        max_local_epochs: passes over the client's examples.
        max_local_steps: steps of the optimiser.
        max_examples_per_round: examples that all steps together read, those that are read again counted again.
        max_seconds: from when the message is read to its reply.
        max_message_gb: that a worker takes of one message, in 2^30 bytes.
    """

    max_local_epochs: float | None = None
    max_local_steps: int | None = None
    max_examples_per_round: int | None = None
    max_seconds: float | None = None
    max_message_gb: float = 16.0


@dataclass(frozen=True, config=STRICT)
class NodeConfig:
    """All that an operator has said.

    Attributes:
        client: the client that the node serves.
        data: its own.
        rank: of the client's factors, where the run gives it none and its method takes clients of several.
        device: in place of the run's.
        cache: on this machine's disk.
        privacy: what is answered.
        secure: sums.
        methods: that may run; None: all.
        models: that may be loaded; None: all.
        limits: of a message.
        evaluate: whether what a run asks to have measured on the held-out part is answered.
    """

    client: str
    data: OwnData
    rank: int | None = None
    device: str | None = None
    cache: Cache = field(default_factory=Cache)
    privacy: OwnPrivacy = field(default_factory=OwnPrivacy)
    secure: OwnSecure = field(default_factory=OwnSecure)
    methods: tuple[str, ...] | None = None
    models: tuple[OwnModel, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    evaluate: bool = True

    @property
    def data_path(self) -> str | None:
        """The client's own data; None where they ship in a package."""
        return None if self.data.path == PACKAGE else self.data.path

    @property
    def cache_folder(self) -> Path:
        """Where what can be made or sent again lies."""
        return Path(self.cache.folder) if self.cache.folder else home()

    def budgets(self, delta: float) -> tuple[Limit, ...]:
        """Return the operator's budgets in a run whose δ is ``delta``: judged there, or at ``max_delta`` where that is smaller."""
        own = self.privacy
        at = min(delta, own.max_delta or delta)
        said = (("max_epsilon", own.max_epsilon, False), ("max_epsilon_run", own.max_epsilon_run, True))
        return tuple(Limit(most, at, f"the node's {key}", of_run) for key, most, of_run in said if most is not None)

    def model(self, name: str) -> OwnModel | None:
        """Return what was said of a model that a run names; None where nothing was."""
        return next((model for model in self.models or () if model.name == name), None)
