"""The one low-rank layer of the project: ``y = W0 x + s · B R A x``, or another product of the factors that a family has.

The factors of a chain are plain ``nn.Linear(bias=False)`` modules, so Opacus has their per-sample gradients for free; those of another
product lie in one module, whose per-sample gradients functorch finds. ``W0`` is written (out, in) = (m, n) throughout, also for GPT-2's
``Conv1D``, which stores its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.frozen_part import FrozenPart
from fedsb.adapters.linear import shape_of
from fedsb.adapters.product import Product, factor_of
from fedsb.adapters.residual import Residual
from fedsb.adapters.spec import AdapterSpec
from fedsb.core.devices import on_host
from fedsb.core.errors import UserError
from fedsb.core.precision import is_mixed
from fedsb.core.state import HEAD, Name, State, laid_out

# Of a base: factors stay float32, and compute in these by autocast.
NARROW = (torch.bfloat16, torch.float16)


class LowRankLayer(nn.Module):
    """``base(x) + s · B(R(A(dropout(x))))`` around a frozen linear layer, with the factors that the family has.

    The factors are float32, whatever the base is; beside a base in bfloat16 or float16 their products are taken in its dtype.

    Attributes:
        base: the frozen ``nn.Linear`` or ``Conv1D``, or of a subclass; what it has and the layer has not is read from it.
        spec: the family. Each factor of a chain is an ``nn.Linear(bias=False)`` under its role's name: A (r, n), R (r, r), B (m, r); those
            of another product are parameters of the module ``product``.
        scale: s.
        frozen: the base with what a run has added to it, by the rule that ``hold`` names.
        active: where False, the layer computes with its frozen part alone.
    """

    def __init__(self, base: nn.Module, spec: AdapterSpec, rank: int, scale: float, dropout: float = 0.0, hold: str = "auto") -> None:
        super().__init__()
        m, n = shape_of(base)
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.base = base
        self.frozen = FrozenPart(base, hold)
        self.spec = spec
        self.rank = rank
        self.scale = scale
        self.active = True
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        shapes = spec.shapes(m, n, rank)
        if spec.is_chain:
            for name in reversed(spec.factors):
                self.add_module(name, factor_of(shapes[name], weight))
        else:
            with weight.device:
                self.product = spec.build(shapes) if spec.build else Product(shapes, spec)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for role in spec.roles:
            factor = self.weight_of(role.name)
            factor.requires_grad_(role.name in spec.learn(1))
            if role.name in spec.frozen:
                self.hold(role.name, None)
            elif not weight.is_meta:
                nn.init.constant_(factor, role.rest)

    def __getattr__(self, name: str) -> Any:
        """Hand on what the layer in its place has and models read: weight, bias, in_features, a subclass' own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A layer that is being copied or unpickled may have no base yet.
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in)."""
        return shape_of(self.base)

    def factor(self, role: str) -> nn.Linear:
        """Return the linear layer that holds a factor of a chain."""
        factor: nn.Linear = getattr(self, role)
        return factor

    def place_of(self, role: str) -> str:
        """Return where in the layer the parameter lies that is a factor."""
        return f"{role}.weight" if self.spec.is_chain else f"product.{role}"

    def weight_of(self, role: str) -> nn.Parameter:
        """Return the parameter that is a factor."""
        return self.get_parameter(self.place_of(role))

    @property
    def pristine(self) -> Tensor:
        """W0 as it was loaded, viewed as (out, in), in floats."""
        return self.frozen.pristine

    def hold(self, role: str, factor: Tensor | None) -> None:
        """Let the layer compute with a frozen factor, which is not copied where it lies as the layer's own would; None stands for zeros.

        It may be of a smaller rank: clients have ranks of their own.

        Raises:
            ValueError: it has a shape of no such rank.
        """
        weight, whole = self.weight_of(role), self.spec.shape(role, *self.shape, self.rank)
        if factor is None:
            # They take no memory: a model that waits for its factors should not weigh as much as one that has them.
            weight.data = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(whole)
            return
        if tuple(factor.shape) not in (self.spec.shape(role, *self.shape, rank) for rank in range(self.rank, 0, -1)):
            raise ValueError(f"{role} is {tuple(factor.shape)}, expected {whole}, or that of a smaller rank")
        weight.data = laid_out(factor.to(weight))

    def set_residual(self, residual: Residual | Tensor | None) -> None:
        """Let the layer compute with W0 and what was added to it, a matrix (out, in) perhaps; None is the pristine W0, bit for bit."""
        self.frozen.set(Residual.of(residual) if isinstance(residual, Tensor) else residual)

    @property
    def residual(self) -> Tensor | None:
        """What :meth:`set_residual` added in effect, (out, in) in float64; None at the pristine W0."""
        return self.frozen.residual

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> LowRankLayer:
        """Move the frozen part along where the layer moves to another device or dtype."""
        self.frozen.move(lambda: super(LowRankLayer, self)._apply(fn, recurse), fn)  # type: ignore[no-untyped-call]
        return self

    def delta(self) -> Tensor:
        """Return the dense ``s · B R A`` (m, n); for tests, merging and export."""
        left, right = self.split()
        return self.scale * (left @ right)

    def split(self, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return ``U`` (m, ρ) and ``V`` (ρ, n) of the weight change ``s · U V``, detached, in ``dtype`` or as the factors are."""
        return self.spec.split(tuple(self.weight_of(role).detach().to(dtype) for role in self.spec.factors))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, n) to (…, m)."""
        whole = self._whole()
        if whole is not None:
            return self.frozen.with_matrix(x, whole)
        y = self.frozen(x)
        if not self.active:
            return y
        if y.dtype not in NARROW or is_mixed(y):
            return self._add(x, y)
        if y.is_meta:  # in float32, as the factors are: shapes have no autocast
            return self._add(x.to(torch.float32), y).to(y.dtype)
        # Here and not around the model, whose own operations keep the types that they have without adapters.
        with torch.autocast(y.device.type, y.dtype):
            return self._add(x, y)

    def _whole(self) -> Tensor | None:
        """Return the product (m, n) and the frozen part's matrix in one, where that is one anyway and nobody has to see it: a pass less."""
        if self.spec.is_chain or not self.active or not isinstance(self.dropout, nn.Identity) or is_watched(self.product):
            return None
        product: Any = self.product
        frozen = self.frozen.matrix if getattr(product, "joins", False) else None
        if frozen is None or is_mixed(frozen):
            return None
        whole: Tensor = product.onto(frozen, self.scale)
        return whole

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.dropout(x)
        if not self.spec.is_chain:
            added: Tensor = self.product(h)
            return y + self.scale * added
        last, *first = self.spec.factors
        for role in reversed(first):
            h = getattr(self, role)(h)
        # s goes to the r columns of h, not to the m of the product: a pass over the largest tensor less, each way.
        out: Tensor = y + getattr(self, last)(self.scale * h)
        return out


def is_watched(module: nn.Module) -> bool:
    """Tell whether somebody has to see what a module gets and gives: by hooks, or by a forward of their own (clients side by side)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module))


def layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Return the adapted layers of a model by sorted module name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    return dict(sorted(found.items()))


def attach(
    model: nn.Module, spec: AdapterSpec, *, targets: list[str], rank: int, scale: float, dropout: float = 0.0, hold: str = "auto"
) -> dict[str, LowRankLayer]:
    """Freeze the model and replace each target by a :class:`LowRankLayer`, in place; return the new layers.

    Raises:
        UserError: ``rank`` exceeds min(m, n) of a target, or ``hold`` is no rule for its weight.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in targets:
        base = model.get_submodule(name)
        m, n = shape_of(base)
        if spec.reach(rank) > min(m, n):
            whose = "" if spec.reach(rank) == rank else f", which needs {spec.reach(rank)} here,"
            raise UserError(
                f"rank ({rank}){whose} exceeds min(out, in) = {min(m, n)} of '{name}'; lower rank or drop it from adapter.targets"
            )
        model.set_submodule(name, LowRankLayer(base, spec, rank, scale, dropout, hold))
    return layers(model)


def read(model: nn.Module, *roles: str) -> State:
    """Copy the factors with the given roles out of a model, as detached CPU float32 tensors."""
    return on_host({Name(name, role): layer.weight_of(role) for name, layer in layers(model).items() for role in roles})


def write(model: nn.Module, state: State) -> None:
    """Copy trained factors into a model, and let it hold frozen ones; names with a role that no layer has (the head) are ignored.

    Raises:
        KeyError: a module of the state is not an adapted layer of the model.
    """
    adapted = layers(model)
    with torch.no_grad():
        for name, tensor in state.items():
            if name.role == HEAD:
                continue
            layer = adapted[name.module]
            if name.role in layer.spec.frozen:
                layer.hold(name.role, tensor)
            elif name.role in layer.spec.factors:
                _fill(layer, name.role, tensor)


def _fill(layer: LowRankLayer, role: str, tensor: Tensor) -> None:
    """Copy a factor to its place, which takes its shape: clients may have ranks of their own."""
    weight = layer.weight_of(role)
    if weight.shape == tensor.shape:
        weight.copy_(tensor)
    else:
        owner, _, attribute = layer.place_of(role).rpartition(".")
        # A parameter of its own: autograd remembers the shape of one that has had a gradient.
        own = nn.Parameter(tensor.detach().to(weight, copy=True), requires_grad=weight.requires_grad)
        setattr(layer.get_submodule(owner), attribute, own)


def release(model: nn.Module) -> None:
    """Let go of the frozen factors: zeros again."""
    for layer in layers(model).values():
        for role in layer.spec.frozen:
            layer.hold(role, None)


def set_residuals(model: nn.Module, residuals: Mapping[str, Residual | Tensor]) -> None:
    """Set every layer to W0 and its residual; a layer without an entry goes back to the pristine W0."""
    for name, layer in layers(model).items():
        layer.set_residual(residuals.get(name))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute without its adapters inside the block (a residual stays)."""
    adapted = list(layers(model).values())
    for layer in adapted:
        layer.active = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.active = True


SCALES: dict[bool, Callable[[float, int], float]] = {False: lambda alpha, rank: alpha / rank, True: lambda alpha, rank: alpha / rank**0.5}


def scale_of(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """Return s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return SCALES[rslora](alpha, rank)
