"""The typed configuration: frozen dataclasses, one a group of ``conf/``, that of ``federation`` in a file of its own.

Defaults live in the YAML files and nowhere else.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from fedsb.config.schema_federation import STRICT as STRICT
from fedsb.config.schema_federation import FederationConfig

Words = str | tuple[str, ...]


@dataclass(frozen=True, config=STRICT)
class MethodConfig:
    """What a method's YAML says.

    ``options`` are keyword arguments of its strategy, ``needs`` are conditions ``key=value`` or ``key!=value``, ``setting`` is a key of
    :data:`fedsb.config.settings.SETTINGS`.
    """

    name: str
    adapter: str
    rank: int
    alpha: float
    lr: float
    options: dict[str, Any]
    needs: tuple[str, ...]
    setting: str


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """Where adapters go and how they scale; ``options`` are keyword arguments of the family."""

    rank: int
    alpha: float
    scale: float | None
    rslora: bool
    dropout: float
    targets: Words
    options: dict[str, Any]


@dataclass(frozen=True, config=STRICT)
class InitConfig:
    """Where the factors start; see the comments in ``conf/config.yaml``."""

    kind: str | None
    evidence: str
    oversample: int
    power_iterations: int
    num_examples: int
    micro_batch: int
    update: str
    core: str
    step: float


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Which model; ``config`` are the fields of a transformers configuration when ``kind`` is ``config``."""

    kind: str
    name: str
    task: str | None
    path: str | None
    revision: str | None
    tokenizer: str | None
    head: Words
    pooling: str
    config: dict[str, Any]
    dtype: str
    attn_implementation: str | None
    quantize: str
    device_map: str | None


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Which examples, which columns, which splits."""

    kind: str
    task: str
    path: str | None
    test_path: str | None
    public_path: str | None
    public_fraction: float
    encoding: str | None
    subset: str | None
    train_split: str
    test_split: str | None
    text: Words | None
    prompt: str | None
    response: str | None
    messages: str | None
    template: str | None
    system: str | None
    choices: str | None
    loss_on: str
    label: str | None
    labels: tuple[str | int, ...] | None
    test_fraction: float
    validation_path: str | None
    validation_fraction: float
    client_test_fraction: float
    max_examples: int | None
    tasks: tuple[str, ...]
    task_rows: int
    task_test_rows: int
    task_options: dict[str, dict[str, Any]]


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Local training on a client."""

    optimizer: str
    lr: float
    preconditioner: str
    weight_decay: float
    momentum: float
    batch_size: int
    eval_batch_size: int
    eval_tokens: int
    local_epochs: int
    local_steps: int | None
    max_length: int
    schedule: str
    schedule_over: str
    warmup: float
    clip_norm: float | None
    autocast: str | None
    accumulation: int
    gradient_checkpointing: bool
    compile: bool
    bucket: int
    packing: bool
    prox_mu: float
    tail_share: float | None
    tail_penalty: float


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    """How often a run is measured, on how much and by what; see the comments in ``conf/eval/default.yaml``."""

    every: int
    max_examples: int | None
    select: str | None
    direction: str
    patience: int | None
    scores: tuple[str, ...]
    scorer: str
    pattern: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]


@dataclass(frozen=True, config=STRICT)
class PrivacyConfig:
    """The privacy mechanism; see the comments in ``conf/privacy/none.yaml``."""

    unit: str
    epsilon: float | None
    noise_multiplier: float | None
    delta: float | None
    accountant: str
    max_epsilon: float | None
    max_grad_norm: float
    clipping: str
    quantile: float
    quantile_lr: float
    count_noise: float
    grad_sample_mode: str
    max_batch: int
    constant_time: bool
    init_fraction: float
    init_norm: float
    init_normalise: bool
    eval_fraction: float
    eval_max_loss: float


@dataclass(frozen=True, config=STRICT)
class RuntimeConfig:
    """Where clients run when Flower's own runtimes are not used."""

    kind: str
    threads: int
    stack: int | Literal["auto"]
    workers: int | None
    cpus: float | None
    gpus: float | None
    address: str | None
    max_retries: int
    client_timeout: float | None


@dataclass(frozen=True, config=STRICT)
class FaultConfig:
    """Faults on purpose; see the comments in ``conf/faults/none.yaml``."""

    dropout: float
    crash: float
    crash_step: int | None
    straggle: float
    delay: float
    corrupt: float
    nan: float


@dataclass(frozen=True, config=STRICT)
class FrozenConfig:
    """How what a run adds to frozen weights is held, and how long what clients hold of it stays on disk."""

    hold: str
    cache_days: float | None
    cache_gb: float | None


@dataclass(frozen=True, config=STRICT)
class CostConfig:
    """Ranks that ``fedsb cost`` uses for single methods."""

    rank: dict[str, int | None]


@dataclass(frozen=True, config=STRICT)
class SweepConfig:
    """How a sweep runs; see the comments in ``conf/sweep/none.yaml``."""

    jobs: int | Literal["auto"]
    samples: int | None
    seed: int
    grid: tuple[tuple[str, ...], ...]
    address: str | None


@dataclass(frozen=True, config=STRICT)
class Config:
    """The whole of a run's configuration."""

    seed: int
    rank: int
    method: MethodConfig
    adapter: AdapterConfig
    init: InitConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    privacy: PrivacyConfig
    federation: FederationConfig
    faults: FaultConfig
    runtime: RuntimeConfig
    sweep: SweepConfig
    frozen: FrozenConfig
    cost: CostConfig
    device: str
    output: str | None
    resume: str | None
    keep_checkpoints: int
    plots: bool
    progress: str
    log_level: Literal["debug", "info", "warning"]
    trackers: tuple[str, ...]
