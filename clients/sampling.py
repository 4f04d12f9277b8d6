"""Per-example gradients: collected by Opacus in a backward pass, and left in ``grad_sample`` of each trained parameter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from clients import grad_samplers  # noqa: F401  (its samplers take the place of Opacus')
from clients.physical import Asked
from fedsb.config.schema import TrainConfig
from fedsb.data import limit_of
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import autocast, collate
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.stack.dropout import undisturbed
from fedsb.tasks.task import Task


@contextmanager
def sampled_gradients(model: nn.Module, functorch: bool = False) -> Iterator[None]:
    """Let every trained parameter collect per-example gradients inside the block."""
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", force_functorch=functorch)
    model.train()
    try:
        with warnings.catch_warnings():
            # True of the first adapted layer, whose input has no gradient, and harmless: only the output's gradient is used.
            warnings.filterwarnings(
                "ignore", message="Full backward hook is firing when gradients are computed with respect to module outputs"
            )
            yield
    finally:
        model.eval()
        hooks.cleanup()
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Drop what Opacus leaves: a forward pass that failed before its backward pass would be counted to the next one's examples."""
    kept = [(module, name) for module in model.modules() for name in ("activations", "max_batch_len")]
    kept += [(p, "summed_grad") for p in model.parameters()]  # type: ignore[misc]
    for owner, name in kept:
        if name in vars(owner):
            delattr(owner, name)


def padded_length(adapted: AdaptedModel, train: TrainConfig) -> int:
    """Return how many tokens every private example is padded to: no data decide, or one text would change and delay what others say."""
    assert adapted.tokenizer is not None
    return limit_of(adapted.tokenizer, train.max_length)


def sample_backward(adapted: AdaptedModel, task: Task, asked: Asked, *, train: TrainConfig, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Collect the per-example gradients of a physical batch; return the sum of the finite losses that count."""
    if not asked:
        return nothing_sampled(parameters)
    batch = collate(asked, adapted, task, padded_length(adapted, train))
    with undisturbed() if asked.probe else nullcontext():
        with nullcontext() if asked.probe else autocast(train, adapted.device):
            losses = task.losses(task.forward(adapted.model, batch), batch)[: asked.counted]
        if losses.requires_grad:
            losses.sum().backward()  # type: ignore[no-untyped-call]
    for p in parameters:
        check_sampled(p, len(asked))
    return finite_sum(losses)


def nothing_sampled(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Leave the per-example gradients of an empty sample; return its loss."""
    loss = torch.zeros(())
    for p in parameters:
        p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
        loss = p.new_zeros(())
    return loss


def check_sampled(p: nn.Parameter, examples: int) -> None:
    """Hold that a parameter has the gradient of each example.

    Raises:
        SelfCheckFailed: ``dependence``, or ``examples`` where a layer folds tokens into its first dimension.
    """
    found = getattr(p, "grad_sample", None)
    if found is None:
        raise SelfCheckFailed("dependence")
    if not isinstance(found, Tensor) or len(found) != examples:
        raise SelfCheckFailed("examples")


def finite_sum(losses: Tensor) -> Tensor:
    """Return the sum of the losses that are finite."""
    return losses.detach().nan_to_num(0.0, 0.0, 0.0).sum()
