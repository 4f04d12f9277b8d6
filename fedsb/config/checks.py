"""Which values a configuration may hold: one table of choices, one of ranges, and the rules that join two keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce
from typing import Any

from fedsb.adapters import SPECS
from fedsb.config.checks_compute import COMPUTE_RULES
from fedsb.config.checks_eval import EVAL_RULES
from fedsb.config.checks_federation import FEDERATION_RULES
from fedsb.config.checks_privacy import PRIVACY_RANGES, PRIVACY_RULES
from fedsb.config.checks_secure import SECURE_RULES
from fedsb.config.checks_tasks import TASK_RULES
from fedsb.config.derived import family, start_kind
from fedsb.config.schema import Config
from fedsb.config.settings import SETTINGS
from fedsb.core.errors import UserError, unknown

CHOICES: dict[str, tuple[Any, ...]] = {
    "method.adapter": tuple(SPECS),
    "method.setting": tuple(SETTINGS),
    "init.kind": (None, *dict.fromkeys(kind for spec in SPECS.values() for kind in spec.starts)),
    "init.evidence": ("clients", "public"),
    "eval.direction": ("auto", "higher", "lower"),
    "init.update": ("sgd", "sign"),
    "init.core": ("zero", "spectral"),
    "model.kind": ("package", "pretrained", "config"),
    "model.task": (None, "classification", "regression", "causal_lm"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.quantize": ("none", "int8", "int4", "nf4", "fp4"),
    "model.device_map": (None, "auto"),
    "model.pooling": ("own", "mean"),
    "data.kind": ("bbc_news", "files", "hub", "reasoning_gym"),
    "data.task": ("classification", "regression", "causal_lm"),
    "data.loss_on": ("response", "all"),
    "eval.scorer": ("auto", "gsm8k", "last_number", "whole", "answer", "regex"),
    "train.optimizer": ("adamw", "adamw8bit", "sgd"),
    "train.preconditioner": ("none", "riemannian"),
    "train.schedule": ("constant", "linear", "cosine"),
    "train.schedule_over": ("run", "round"),
    "train.autocast": (None, "bfloat16"),
    "federation.weighting": ("examples", "uniform", "fedau"),
    "federation.lost_state": ("refuse", "anew"),
    "federation.wire_dtype": ("float32", "bfloat16", "int8"),
    "federation.partition.kind": (None, "iid", "dirichlet", "shard", "size", "natural", "length", "cluster", "quantity"),
    "federation.server_optimizer.name": ("none", "momentum", "adam"),
    "privacy.unit": ("none", "example", "client"),
    "privacy.accountant": ("prv", "rdp", "pld"),
    "privacy.clipping": ("flat", "per_layer", "adaptive"),
    "privacy.grad_sample_mode": ("hooks", "functorch"),
    "frozen.hold": ("auto", "factors", "dense", "merge"),
    "runtime.kind": ("local", "ray"),
    "progress": ("auto", "lines", "json"),
}

FAULTS = ("dropout", "crash", "straggle", "corrupt", "nan")  # probabilities

# key -> (condition, what is allowed); a value of None is not checked.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda v: v >= 1, "at least 1"),
    "adapter.rank": (lambda v: v >= 1, "at least 1"),
    "adapter.alpha": (lambda v: v > 0, "above 0"),
    "adapter.scale": (lambda v: v > 0, "above 0"),
    "adapter.dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "init.oversample": (lambda v: v >= 0, "at least 0"),
    "init.power_iterations": (lambda v: v >= 0, "at least 0"),
    "init.num_examples": (lambda v: v >= 1, "at least 1"),
    "init.micro_batch": (lambda v: v >= 1, "at least 1"),
    "init.step": (lambda v: v > 0, "above 0"),
    "data.test_fraction": (lambda v: 0 < v < 1, "between 0 and 1"),
    "data.client_test_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "federation.partition.groups": (lambda v: v >= 2, "at least 2"),
    "data.public_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "data.validation_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "eval.patience": (lambda v: v >= 1, "at least 1"),
    "data.max_examples": (lambda v: v >= 2, "at least 2"),
    "data.task_rows": (lambda v: 1 <= v <= 10**6, "in 1 to 1,000,000"),
    "data.task_test_rows": (lambda v: 1 <= v <= 10**6, "in 1 to 1,000,000"),
    "train.lr": (lambda v: v > 0, "above 0"),
    "train.weight_decay": (lambda v: v >= 0, "at least 0"),
    "train.momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "train.batch_size": (lambda v: v >= 1, "at least 1"),
    "train.eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "train.eval_tokens": (lambda v: v >= 1, "at least 1"),
    "eval.every": (lambda v: v >= 1, "at least 1"),
    "eval.max_examples": (lambda v: v >= 1, "at least 1"),
    "eval.max_new_tokens": (lambda v: v >= 1, "at least 1"),
    "eval.temperature": (lambda v: v >= 0, "at least 0"),
    "eval.top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "train.local_epochs": (lambda v: v >= 1, "at least 1"),
    "train.local_steps": (lambda v: v >= 1, "at least 1"),
    "train.max_length": (lambda v: v >= 2, "at least 2"),
    "train.warmup": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "train.clip_norm": (lambda v: v > 0, "above 0"),
    "train.accumulation": (lambda v: v >= 1, "at least 1"),
    "train.bucket": (lambda v: v >= 1, "at least 1"),
    "train.prox_mu": (lambda v: v >= 0, "at least 0"),
    "train.tail_share": (lambda v: 0 < v < 1, "between 0 and 1"),
    "train.tail_penalty": (lambda v: v >= 0, "at least 0"),
    "federation.num_clients": (lambda v: v >= 0, "at least 1"),
    "federation.num_rounds": (lambda v: v >= 0, "at least 1"),
    "federation.fraction": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "federation.min_replies": (lambda v: v >= 1, "at least 1"),
    "federation.cutoff": (lambda v: v >= 1, "at least 1"),
    "federation.secure_dropout": (lambda v: 0 <= v < 0.5, "in [0, 0.5)"),
    "federation.secure_bound": (lambda v: v > 0, "above 0"),
    "federation.timeout": (lambda v: v > 0, "above 0"),
    "federation.wait": (lambda v: v >= 0, "at least 0"),
    "federation.partition.alpha": (lambda v: v > 0, "above 0"),
    "federation.partition.shards_per_client": (lambda v: v >= 1, "at least 1"),
    "federation.server_optimizer.lr": (lambda v: v > 0, "above 0"),
    "federation.server_optimizer.momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "federation.server_optimizer.betas": (lambda v: all(0 <= beta < 1 for beta in v), "two numbers in [0, 1)"),
    "federation.server_optimizer.eps": (lambda v: v > 0, "above 0"),
    **PRIVACY_RANGES,
    **{f"faults.{kind}": (lambda v: 0 <= v <= 1, "in [0, 1]") for kind in FAULTS},
    "faults.crash_step": (lambda v: v >= 1, "at least 1"),
    "faults.delay": (lambda v: v > 0, "above 0"),
    "keep_checkpoints": (lambda v: v >= 1, "at least 1"),
    "frozen.cache_days": (lambda v: v is None or v > 0, "above 0, or null"),
    "frozen.cache_gb": (lambda v: v is None or v > 0, "above 0, or null"),
    "runtime.threads": (lambda v: v >= 1, "at least 1"),
    "sweep.jobs": (lambda v: v == "auto" or v >= 1, "auto, or at least 1"),
    "sweep.samples": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "runtime.stack": (lambda v: v == "auto" or v >= 1, "auto, or at least 1"),
    "runtime.workers": (lambda v: v >= 1, "at least 1"),
    "runtime.cpus": (lambda v: v > 0, "above 0"),
    "runtime.gpus": (lambda v: 0 <= v <= 1 or v == int(v) > 0, "in [0, 1], or a whole number"),
    "runtime.max_retries": (lambda v: v >= 0, "at least 0"),
    "runtime.client_timeout": (lambda v: v > 0, "above 0"),
}

TRACKERS = ("tensorboard", "mlflow", "wandb")


def check(config: Config) -> None:
    """Hold a configuration against the tables and the joint rules.

    Raises:
        UserError: the first value that is not allowed, with what is.
    """
    for key, allowed in CHOICES.items():
        value = _get(config, key)
        if value not in allowed:
            raise unknown(key, str(value), ["null" if choice is None else str(choice) for choice in allowed])
    for key, (holds, text) in RANGES.items():
        value = _get(config, key)
        if value is not None and not holds(value):
            raise UserError(f"{key}={value} is out of range; it must be {text}")
    for rule in JOINT_RULES:
        rule(config)


def _get(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _start_fits_adapter(config: Config) -> None:
    starts = family(config).starts
    if config.init.kind is not None and not starts:
        raise UserError(f"init.kind={config.init.kind}: method '{config.method.name}' has no adapters to start; leave init.kind=null")
    if config.init.kind is not None and config.init.kind not in starts:
        raise UserError(f"init.kind={config.init.kind} is not defined for method '{config.method.name}'; choose from {', '.join(starts)}")


def _needs_are_met(config: Config) -> None:
    for need in config.method.needs:
        key, _, wanted = need.partition("=")
        key, other = key.removesuffix("!"), key.endswith("!")
        try:
            value = _get(config, key)
        except AttributeError:
            raise UserError(f"conf/method/{config.method.name}.yaml: needs names '{key}', which is no key of the configuration") from None
        if (str(value).lower() == wanted.lower()) == other:
            raise UserError(f"{key}={value}: method '{config.method.name}' needs {need}; leave {key} out, or take another method")


def _a_private_model_is_whole(config: Config) -> None:
    own = family(config).own
    if own and config.privacy.unit != "none":
        raise UserError(
            f"privacy.unit={config.privacy.unit} with method '{config.method.name}': each client keeps its own {', '.join(own)}, and "
            "training those with noise is not provided for; use another method, or privacy=none"
        )


def _sign_needs_public(config: Config) -> None:
    if config.init.update == "sign" and config.init.evidence == "clients":
        raise UserError(
            "init.update=sign with init.evidence=clients: the sign of a mean is not linear in the clients; "
            "use init.evidence=public (with data.public_fraction or data.public_path) or init.update=sgd"
        )


def _public_needs_text(config: Config) -> None:
    wanted = config.init.evidence == "public" and start_kind(config) == "gradient"
    if wanted and not config.data.public_fraction and not config.data.public_path:
        raise UserError("init.evidence=public needs text the server may hold; set data.public_path=… or data.public_fraction=0.05")


def _device_is_known(config: Config) -> None:
    if config.device != "auto" and not re.fullmatch(r"(cpu|cuda)(:\d+)?", config.device):
        raise unknown("device", config.device, ["auto", "cpu", "cuda"])


def _trackers_are_known(config: Config) -> None:
    for name in config.trackers:
        if name not in TRACKERS:
            raise unknown("tracker in trackers", name, TRACKERS)


def _fraction_has_a_start(config: Config) -> None:
    if config.privacy.init_fraction and (start_kind(config) != "gradient" or config.init.evidence != "clients"):
        raise UserError(
            f"privacy.init_fraction={config.privacy.init_fraction:g} pays for a start from the clients' data, but "
            f"init.kind={start_kind(config)} with init.evidence={config.init.evidence} uses none; set it to 0"
        )


JOINT_RULES: tuple[Callable[[Config], None], ...] = (
    _start_fits_adapter,
    _a_private_model_is_whole,
    _needs_are_met,
    _sign_needs_public,
    _public_needs_text,
    _device_is_known,
    _fraction_has_a_start,
    _trackers_are_known,
    *FEDERATION_RULES,
    *PRIVACY_RULES,
    *SECURE_RULES,
    *TASK_RULES,
    *EVAL_RULES,
    *COMPUTE_RULES,
)
