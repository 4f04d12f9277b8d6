"""Several clients' factors in one forward and backward pass over one frozen model: examples of all lie side by side in the batch.

Every module that owns trained parameters computes each client's rows with that client's values, as one batched product where the rows are
equal in number; all that is frozen sees one large batch. Nothing a client computes depends on who lies beside it: rows do not mix, what is
padded is masked, and random numbers (dropout) are drawn for each client from its own stream and for its own shape, as if it were alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedsb.adapters.layer import NARROW, LowRankLayer
from fedsb.core.errors import UserError
from fedsb.core.precision import is_mixed
from fedsb.core.rng import Turns, generator_states
from fedsb.core.state import HEAD, Name, State
from fedsb.models.adapted import AdaptedModel
from fedsb.stack.batched import batched_linear, batched_lora
from fedsb.stack.dropout import fill_noise, is_off

# Which dimensions of an activation run over tokens, by the number of its dimensions: hidden states (b, l, d), attention (b, heads, l, l).
TOKEN_DIMS: dict[int, tuple[int, ...]] = {3: (1,), 4: (2, 3)}


class Part(NamedTuple):
    """The rows of one client in a pass: how many, and how long they are without the others' padding."""

    client: int
    rows: int
    length: int


@dataclass(frozen=True)
class TrainedModule:
    """A module that owns trained parameters: their names by attribute, and what each client has in their place."""

    module: nn.Module
    names: Mapping[str, Name]
    members: Sequence[Mapping[Name, nn.Parameter]]

    @cached_property
    def copies(self) -> tuple[nn.Module, ...]:
        """One copy of the module a client, with that client's values."""
        return tuple(_shadow(self.module, self.names, member) for member in self.members)

    def stacked(self, attribute: str, parts: Sequence[Part]) -> Tensor | None:
        """Return the clients' values of a parameter, one after the other; None where the module has no such parameter."""
        name, own = self.names.get(attribute), getattr(self.module, attribute)
        if own is None:
            return None
        return torch.stack([own if name is None else self.members[part.client][name] for part in parts])


class Stack:
    """Clients that train over one frozen model.

    Args:
        adapted: holds the server's state; its own factors are not moved.
        dropout: where each client's random numbers come from; as many as there are clients.
        own: what each client brings of its own; the rest it has from the server.

    Attributes:
        members: what each client trains, by name; at the values that it starts from when the stack is made.
    """

    def __init__(self, adapted: AdaptedModel, dropout: Sequence[torch.Generator], own: Sequence[State] | None = None) -> None:
        trainable, mine = adapted.trainable(), own or [State()] * len(dropout)
        self.adapted = adapted
        self.members: list[dict[Name, nn.Parameter]] = [
            {name: nn.Parameter(each.get(name, p).detach().to(p, copy=True)) for name, p in trainable.items()} for each in mine
        ]
        self._turns = Turns(dropout)
        self._parts: Sequence[Part] = ()

    @cached_property
    def trained(self) -> tuple[TrainedModule, ...]:
        """The modules that own trained parameters."""
        found: dict[nn.Module, dict[str, Name]] = {}
        for name in self.adapted.trainable():
            path = name.module if name.role == HEAD else f"{name.module}.{self.adapted.layers[name.module].place_of(name.role)}"
            owner, _, attribute = path.rpartition(".")
            found.setdefault(self.adapted.model.get_submodule(owner), {})[attribute] = name
        if any(list(module.children()) for module in found):
            raise UserError("model.head trains a module that holds others, which clients side by side cannot; set runtime.stack=1")
        if own := [type(module).__name__ for module in found if "forward" in vars(module)]:
            raise UserError(
                f"the model's '{own[0]}' that it trains has a forward of its own, with one client's values; set runtime.stack=1"
            )
        return tuple(TrainedModule(module, names, self.members) for module, names in found.items())

    @contextmanager
    def laid(self) -> Iterator[None]:
        """Let the model compute with the clients' values inside the block; each pass names its parts by :meth:`among`."""
        at = {owner.module: owner for owner in self.trained}
        layers = [layer for layer in self.adapted.model.modules() if isinstance(layer, LowRankLayer) and _is_plain_lora(layer, at)]
        for owner in self.trained:
            owner.module.forward = partial(self._forward, owner)
        for layer in layers:
            layer.forward = partial(self._low_rank, layer, at)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in (*at, *layers):
                del module.forward

    @contextmanager
    def among(self, parts: Sequence[Part]) -> Iterator[None]:
        """Say whose rows the passes inside the block hold, in their order.

        Raises:
            UserError: the model draws random numbers in a way that cannot be given to each client.
        """
        before = generator_states()
        self._parts = parts
        try:
            with _OwnNumbers(self._turns, parts):
                yield
        finally:
            self._parts = ()
        if not all(map(torch.equal, before, generator_states())):
            raise UserError("this model draws random numbers beside its dropout, which clients side by side cannot do; set runtime.stack=1")

    def forward_of(self, client: int, forward: Callable[[], Tensor], rows: int = 1) -> Tensor:
        """Compute with one client's values, alone."""
        with self.laid(), self.among([Part(client, rows, 0)]):
            return forward()

    def _low_rank(self, layer: LowRankLayer, at: Mapping[nn.Module, TrainedModule], x: Tensor) -> Tensor:
        """Compute a whole LoRA layer at once, where nobody has to see what its factors get: neither hooks nor mixed precision."""
        rows = rows_of(self._parts, len(x))
        watched = layer.A._forward_hooks or is_mixed(x) or x.dtype in NARROW
        if watched or not layer.active or len(rows) == 1 or len(set(rows)) > 1:
            alone: Tensor = LowRankLayer.forward(layer, x)
            return alone
        a, b = (cast(Tensor, at[factor].stacked("weight", self._parts)) for factor in (layer.A, layer.B))
        blocks = x.reshape(len(rows), -1, x.shape[-1])
        out = batched_lora(blocks, cast(nn.Linear, layer.base), a, b, layer.scale).view(*x.shape[:-1], -1)
        added = layer.frozen.added(x)
        return out if added is None else out + added

    def _forward(self, owner: TrainedModule, x: Tensor) -> Tensor:
        parts = self._parts
        rows = rows_of(parts, len(x))
        if type(owner.module) is nn.Linear and len(parts) > 1 and len(set(rows)) == 1:
            blocks = x.reshape(len(parts), -1, x.shape[-1])
            return batched_linear(blocks, cast(Tensor, owner.stacked("weight", parts)), owner.stacked("bias", parts)).view(
                *x.shape[:-1], -1
            )
        for part in parts:
            owner.copies[part.client].training = owner.module.training
        pieces = torch.split(x, rows)
        out: Tensor = torch.cat([owner.copies[part.client](piece) for part, piece in zip(parts, pieces, strict=True)])
        return out


def _is_plain_lora(layer: LowRankLayer, trained: Container[nn.Module]) -> bool:
    """Tell whether a module is ``base(x) + s · B(A(x))`` over an ``nn.Linear``, both factors trained, without dropout in between."""
    return (
        type(layer.base) is nn.Linear
        and "forward" not in vars(layer)
        and layer.spec.is_chain
        and layer.spec.factors == ("B", "A")
        and isinstance(layer.dropout, nn.Identity)
        and layer.A in trained
        and layer.B in trained
    )


def rows_of(parts: Sequence[Part], total: int) -> list[int]:
    """Return how many of ``total`` rows belong to each part; a layer may fold tokens into the rows."""
    unit, rest = divmod(total, sum(part.rows for part in parts))
    if rest:
        raise UserError("a layer of this model does not keep examples in its first dimension, as a stack needs; set runtime.stack=1")
    return [unit * part.rows for part in parts]


def _shadow(module: nn.Module, names: Mapping[str, Name], member: Mapping[Name, nn.Parameter]) -> nn.Module:
    """Return a module that computes as ``module`` does, with a client's values; no hook of the first is its own."""
    shadow = copy.copy(module)
    shadow.__dict__.pop("forward", None)  # the stack's own, inside Stack.laid
    shadow._parameters = {**module._parameters, **{attribute: member[name] for attribute, name in names.items()}}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(shadow, hooks, type(getattr(module, hooks))())
    return shadow


class _OwnNumbers(TorchFunctionMode):
    """Draws dropout for each client from its own stream and for its own shape."""

    def __init__(self, turns: Turns, parts: Sequence[Part]) -> None:
        super().__init__()
        self._turns = turns
        self._parts = parts

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        own = RANDOM.get(function)
        given = dict(kwargs or {})
        return function(*args, **given) if own is None else own(self, *args, **given)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0 or is_off():
            return input
        if len(input) != sum(part.rows for part in self._parts):
            raise UserError("this model's dropout folds tokens into the batch, which clients side by side cannot do; set runtime.stack=1")
        joint = self._noise(input, p)
        return input.mul_(joint) if inplace else input * joint

    def _noise(self, like: Tensor, p: float) -> Tensor:
        """Return what dropout multiplies by: drawn for each client by itself, and for as many tokens as it has alone."""
        tokens, dims = max(part.length for part in self._parts), TOKEN_DIMS.get(like.ndim, ())
        cut = dims if all(like.shape[d] == tokens for d in dims) else ()
        padded = cut and any(part.length < tokens for part in self._parts)
        joint = (torch.zeros_like if padded else torch.empty_like)(like, requires_grad=False)
        for part, noise in zip(self._parts, torch.split(joint, [part.rows for part in self._parts]), strict=True):
            for d in cut:
                noise = noise.narrow(d, 0, part.length)
            fill_noise(noise, p, self._turns, part.client)
        return joint

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        whole: Any = F.scaled_dot_product_attention
        if dropout_p == 0.0 or is_off():
            out: Tensor = whole(query, key, value, attn_mask, 0.0, *args, **options)
            return out
        if self._can_attend_at_once(query, key, attn_mask, args, options):
            return self._attend(query, key, value, attn_mask, dropout_p, options.get("scale"))
        rows = rows_of(self._parts, len(query))
        shared = attn_mask is None or len(attn_mask) == 1
        masks = [attn_mask] * len(rows) if shared else torch.split(attn_mask, rows)  # type: ignore[arg-type]
        pieces = []
        for part, mask, *own in zip(self._parts, masks, *(torch.split(t, rows) for t in (query, key, value)), strict=True):
            n = part.length
            cut = None if mask is None else mask[..., : n if mask.shape[-2] > 1 else 1, :n]
            with self._turns.turn(part.client):
                piece = whole(*(t[:, :, :n] for t in own), cut, dropout_p, *args, **options)
            pieces.append(_padded(piece, {2: query.shape[2]}))
        return torch.cat(pieces)

    def _can_attend_at_once(self, q: Tensor, k: Tensor, mask: Tensor | None, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Tell whether all clients' attention can be computed as torch does one's on a CPU with dropout: plainly, a mask over all scores.

        Where the clients' texts differ in length, the mask must hide the padding, and dropout must know which scores are padding.
        """
        plain = not args and not options.get("is_causal") and options.keys() <= {"scale", "is_causal"}
        by_example = q.ndim == 4 and len(q) == sum(part.rows for part in self._parts)
        lengths = {part.length for part in self._parts}
        told_apart = len(lengths) == 1 or (mask is not None and q.shape[2] == k.shape[2] == max(lengths))
        return plain and by_example and told_apart and q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float | None) -> Tensor:
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        if mask is not None:
            # No infinity: padding that attends to nothing would be NaN, in the others' gradients too.
            least = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask.clamp_min(least)
        return (scores.softmax(-1) * self._noise(scores, p)) @ v


def _padded(x: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """Fill up dimensions with zeros."""
    missing = [sizes.get(d, x.shape[d]) - x.shape[d] for d in range(x.ndim)]
    return F.pad(x, [n for d in reversed(range(x.ndim)) for n in (0, missing[d])]) if any(missing) else x


RANDOM: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _OwnNumbers.dropout,
    F.scaled_dot_product_attention: _OwnNumbers.attention,
}
