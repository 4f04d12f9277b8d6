"""Joint rules on how passes are computed: in what precision, in how many pieces, and with whom."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from fedsb.config.derived import ALONE, alone_by, family
from fedsb.config.schema import Config
from fedsb.core.errors import UserError

# What private training cannot have, and why.
NOT_PRIVATE = {
    "train.accumulation": "a private sample is split by privacy.max_batch; leave it at 1",
    "train.gradient_checkpointing": "what is computed twice would be counted twice in an example's gradient; lower privacy.max_batch",
    "train.compile": "gradients by example are collected by hooks, which compiled code does not call; leave it out",
    "model.dtype": "the scale that float16's gradients need follows the gradients of all examples; use model.dtype=bfloat16",
    "model.device_map": "the norm of an example's gradient is over all layers, and would go from GPU to GPU in every step; leave it out, "
    "and use model.quantize=int4 where one GPU is too small",
}


def _written(config: Config, key: str) -> str:
    value = reduce(getattr, key.split("."), config)
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _is_not_for_a_stack(config: Config) -> None:
    key = alone_by(config)
    if key is not None and config.runtime.stack not in ("auto", 1):
        raise UserError(f"{_written(config, key)} is not for clients side by side; set runtime.stack=1, or leave it out")


def _is_not_for_gradients_by_example(config: Config) -> None:
    key = next((key for key in NOT_PRIVATE if ALONE[key](config)), None)
    if config.privacy.unit == "example" and key is not None:
        raise UserError(f"{_written(config, key)} with privacy.unit=example: {NOT_PRIVATE[key]}")


def _precisions_agree(config: Config) -> None:
    if config.model.dtype == "float16" and config.train.autocast is not None:
        raise UserError(
            f"train.autocast={config.train.autocast} with model.dtype=float16: a pass has one of the two; leave train.autocast out"
        )


def _a_spread_base_has_its_gpus(config: Config) -> None:
    if config.model.device_map is None:
        return
    said = f"with model.device_map={config.model.device_map}"
    if config.device not in ("auto", "cuda"):
        raise UserError(f"device={config.device} {said}: a base is spread over all GPUs that the process sees; leave one of the two out")
    if config.train.compile:
        raise UserError(f"train.compile=true {said}: compiled code ends wherever a base goes on to another GPU; leave one of the two out")


def _what_is_preconditioned_is_a_pair(config: Config) -> None:
    learnt = family(config).learn(1)
    if config.train.preconditioner != "none" and not {"A", "B"} <= {*learnt}:
        raise UserError(
            f"train.preconditioner={config.train.preconditioner} is for LoRA's B and A, both trained in one round, and method "
            f"'{config.method.name}' trains {', '.join(learnt) or 'no factors'}; leave it out"
        )


def _what_is_pressed_down_is_a_pair(config: Config) -> None:
    train, learnt = config.train, family(config).learn(1)
    if train.tail_penalty and train.tail_share is None:
        raise UserError(
            f"train.tail_penalty={train.tail_penalty:g} presses down what is behind train.tail_share of the rank, which is not given; set "
            "train.tail_share=0.5, say, or leave the penalty at 0"
        )
    if train.tail_penalty and not {"A", "B"} <= {*learnt}:
        raise UserError(
            f"train.tail_penalty={train.tail_penalty:g} is for LoRA's B and A, both trained in one round, and method "
            f"'{config.method.name}' trains {', '.join(learnt) or 'no factors'}; leave it at 0"
        )


COMPUTE_RULES: tuple[Callable[[Config], None], ...] = (
    _is_not_for_a_stack,
    _is_not_for_gradients_by_example,
    _precisions_agree,
    _what_is_preconditioned_is_a_pair,
    _what_is_pressed_down_is_a_pair,
    _a_spread_base_has_its_gpus,
)
