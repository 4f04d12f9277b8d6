"""Optimisers that act on the mean update, by torch's own classes (Reddi et al. 2021, arXiv:2003.00295; Hsu et al. 2019, arXiv:1909.06335).

The pseudo-gradient is ``current − mean``: plain SGD with rate 1 is FedAvg. On R of Fed-SB, momentum equals momentum on ΔW, since
B and A are fixed; Adam works entry by entry and so depends on the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fedsb.core.errors import unknown
from fedsb.core.state import Name, State

Build = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


class ServerOptimizer:
    """Wraps a torch optimiser around a server state; its moments live as long as the run."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._parameters: list[torch.nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._names: tuple[Name, ...] = ()
        self._earlier = State()

    def step(self, current: State, mean: State) -> State:
        """Return the next state from the current one and the clients' mean, in float64."""
        if self._optimizer is None:
            self._begin(current)
        with torch.no_grad():
            for parameter, (name, tensor) in zip(self._parameters, current.items(), strict=True):
                parameter.copy_(tensor)
                parameter.grad = tensor.double() - mean[name].double()
        assert self._optimizer is not None
        self._optimizer.step()
        return State({name: p.detach().clone() for p, name in zip(self._parameters, current, strict=True)})

    def moments(self) -> State:
        """Return what the optimiser has gathered, by name and under the role ``<role>.<its key>``; nothing before the first step."""
        if self._optimizer is None:
            return self._earlier
        found = self._optimizer.state_dict()["state"]
        return State({Name(n.module, f"{n.role}.{key}"): t for i, n in enumerate(self._names) for key, t in found.get(i, {}).items()})

    def take_up(self, moments: State) -> None:
        """Go on with the moments of an earlier process."""
        self._earlier = moments

    def _begin(self, current: State) -> None:
        self._names = tuple(current)
        self._parameters = [torch.nn.Parameter(t.double().clone()) for t in current.values()]
        self._optimizer = self._build(self._parameters)
        if not len(self._earlier):
            return
        gathered: dict[int, dict[str, torch.Tensor]] = {}
        for (module, role), tensor in self._earlier.items():
            owner, _, key = role.rpartition(".")
            gathered.setdefault(self._names.index(Name(module, owner)), {})[key] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": gathered})


def _momentum(lr: float, momentum: float, betas: tuple[float, float], eps: float) -> ServerOptimizer:
    return ServerOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum))


def _adam(lr: float, momentum: float, betas: tuple[float, float], eps: float) -> ServerOptimizer:
    return ServerOptimizer(lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps))


SERVER_OPTIMIZERS: dict[str, Callable[[float, float, tuple[float, float], float], ServerOptimizer | None]] = {
    "none": lambda lr, momentum, betas, eps: None,
    "momentum": _momentum,
    "adam": _adam,
}


def server_optimizer(
    name: str, *, lr: float = 1.0, momentum: float = 0.9, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3
) -> ServerOptimizer | None:
    """Build a server optimiser by name: ``none``, ``momentum`` (FedAvgM) or ``adam`` (FedAdam).

    Raises:
        UserError: an unknown name.
    """
    if name not in SERVER_OPTIMIZERS:
        raise unknown("federation.server_optimizer.name", name, SERVER_OPTIMIZERS)
    return SERVER_OPTIMIZERS[name](lr, momentum, betas, eps)


def server_step(current: State, mean: State, share: float, optimizer: ServerOptimizer | None) -> State:
    """Return the next state: ``share`` of the mean update (1 but for FedAU), and what the optimiser makes of that.

    It is ``mean`` itself where neither acts.
    """
    if share != 1.0:
        mean = State({name: current[name] + share * (t - current[name]) for name, t in mean.items()})
    return mean if optimizer is None else optimizer.step(current, mean)
