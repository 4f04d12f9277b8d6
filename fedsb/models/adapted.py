"""Models with their adapters on: loaded once a process, then only written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedsb.adapters import (
    AdapterSpec,
    Layouts,
    LowRankLayer,
    layers,
    read,
    release,
    set_residuals,
    write,
)
from fedsb.adapters.exactness import encoding_error
from fedsb.adapters.frozen_part import FACTORS, FrozenPart
from fedsb.adapters.masked import seen
from fedsb.core.devices import on_devices, on_host
from fedsb.core.state import HEAD, Layout, Name, State, squared_norm, subtract
from fedsb.models.compiling import compiled
from fedsb.wire.frozen import FrozenView

Made = TypeVar("Made")


@dataclass
class AdaptedModel:
    """A frozen model with low-rank layers and a trained head.

    Attributes:
        model: the network; factors and head are the only parameters that require gradients.
        spec: the adapter family.
        scale: s of every layer.
        head: sorted names of the trained parameters outside the adapters.
        tokenizer: of the model; None for shapes without weights.
        initial: what is ever trained, as it was built.
        drawn: sorted names of the frozen parameters that no checkpoint holds: they go wherever the head goes.
        seed: of the run.
        remarks: what a user should know of the model before it is trained.
    """

    model: nn.Module
    spec: AdapterSpec
    scale: float
    head: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    initial: State = field(default_factory=State)
    drawn: tuple[str, ...] = ()
    seed: int = 0
    remarks: tuple[str, ...] = ()
    _layouts: dict[int | None, Layouts] = field(default_factory=dict, repr=False)
    _made: tuple[object, Any] = field(default=(None, None), repr=False)
    _round: int = 1  # whose state is installed
    _basis: tuple[State, State] = field(default_factory=lambda: (State(),) * 2, repr=False)  # as it came, and on the layers' devices

    @cached_property
    def layers(self) -> dict[str, LowRankLayer]:
        """The adapted layers by sorted name."""
        return layers(self.model)

    @cached_property
    def compiled(self) -> nn.Module:
        """The network compiled by torch, for batches of any size."""
        return compiled(self.model)

    def expect_growth(self, grows: bool) -> None:
        """Say whether rounds will add to frozen weights: what is compiled then is compiled for all that they may add."""
        for part in self.frozen_parts().values():
            part.expect_growth(grows)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of every adapted layer."""
        return {name: layer.shape for name, layer in self.layers.items()}

    def layout(self, *roles: str, rank: int | None = None, head: bool = True) -> Layout:
        """Return the layout of some of the factors, at the rank that the model was built with or a smaller one, and of the head."""
        parameters = dict(self.model.named_parameters())
        shapes: dict[Name, tuple[int, ...]] = {
            Name(module, role): self.spec.shape(role, *layer.shape, rank or layer.rank)
            for module, layer in self.layers.items()
            for role in roles
        }
        shapes |= {Name(name, HEAD): tuple(parameters[name].shape) for name in (self.head if head else ())}
        return Layout(tuple(sorted(shapes.items())))

    @cached_property
    def layouts(self) -> Layouts:
        """What travels: down in every round, and up after each turn."""
        return self._layouts_at(None)

    def _layouts_at(self, rank: int | None) -> Layouts:
        if rank not in self._layouts:
            sketched = self.spec.sketch is not None
            self._layouts[rank] = Layouts(
                down=self.layout(*self.spec.in_state, rank=rank, head=self.spec.head.down == "state"),
                up=tuple(
                    self.layout(*(("Y",) if sketched else self.spec.uploaded(turn)), rank=rank, head=bool(self.spec.head.up))
                    for turn in range(1, self.spec.turns + 1)
                ),
                asked=self.layout(*(("Q",) if sketched else ()), rank=rank, head=False),
                told=self.layout(*(("Z", "P") if sketched else ()), rank=rank, head=False),
                learnt=self.layout(*self.spec.ever_learn, rank=rank),
                log=self.layout(*self.spec.in_log, rank=rank, head=False),
                made=self.layout(*self.spec.made, rank=rank, head=False),
                block=self.spec.block,
                narrower=self._layouts_at,
            )
        return self._layouts[rank]

    def copied(self, *roles: str) -> State:
        """Copy some of the factors out of the model, and the head."""
        return read(self.model, *roles).merge(self._head_state())

    def trained(self) -> State:
        """Copy out what learns in the round whose state is installed."""
        return on_host(self.trainable())

    def sent(self, trained: State, round_number: int) -> State:
        """Return what a client uploads of the factors and the head that it has trained in a round."""
        if self.spec.sketch is not None:
            return self.spec.sketch.ranges(self.spec, self.kept(trained), self.seed, round_number).merge(trained.pick(HEAD))
        names = dict(self.layouts.up_in(round_number).shapes)
        return State({name: t for name, t in self.spec.fold(trained).items() if name in names})

    def kept(self, trained: State) -> State:
        """Return what a client keeps of what it has trained: its own, and where the server will ask for it again all factors."""
        if self.spec.sketch is None:
            return trained.pick(*self.spec.own)
        resting = [role for role in self.spec.factors if role not in self.spec.learn(self._round)]
        return read(self.model, *resting).merge(trained.pick(*self.spec.factors))

    def encoding_error(self, trained: State, round_number: int, decoded: State) -> float:
        """Return ``‖ΔW − ΔW as decoded‖_F`` of an upload, head included; the model holds what does not learn beside.

        Args:
            trained: all that learnt in the round.
            round_number: of the round.
            decoded: the upload as the server has it.
        """
        if self.spec.sketch is not None:  # what is lost of the product shows when it is projected
            return float(squared_norm(subtract(decoded.pick(HEAD), trained)) ** 0.5)
        resting = [role for role in self.spec.factors if role not in self.spec.learn(round_number)]
        beside = read(self.model, *resting).merge(self.spec.at_rest(self._installed(*self.spec.folded)))
        seen = self.spec.fold(trained)
        return encoding_error(seen, seen.merge(decoded), self.spec, self.scale, beside)

    def _installed(self, *roles: str) -> Layout:
        """Return the layout of some of the factors at the rank that is installed."""
        return Layout(
            tuple(sorted((Name(n, role), tuple(layer.weight_of(role).shape)) for n, layer in self.layers.items() for role in roles))
        )

    def _head_state(self, *more: str) -> State:
        parameters = dict(self.model.named_parameters())
        return on_host({Name(name, HEAD): parameters[name] for name in sorted((*self.head, *more))})

    def beside_base(self) -> State:
        """Copy out what the base does not hold beside the adapters: the head, and what was drawn and is not trained."""
        return self._head_state(*self.drawn)

    def reset(self) -> None:
        """Bring the model back to what it was when it was built; a process keeps it from one run to the next."""
        release(self.model)
        self.install(self.initial, FrozenView())

    def install(self, state: State, frozen: FrozenView, round_number: int = 1) -> None:
        """Bring a whole state into the model: what comes from the log, held without a copy where nobody trains it, factors and head.

        Args:
            state: factors and the head, by name. A factor that nobody sends and the client does not bring is as it was built.
            frozen: what clients hold from the log, and what everybody makes.
            round_number: whose turn it is to learn.
        """
        self._take_turn(round_number)
        unsent = State({name: t for name, t in self.initial.items() if name not in state and name.role in self._unsent})
        moved = self._placed(unsent.merge(state))
        write(self.model, self._here(frozen.basis))
        set_residuals(self.model, seen(self.spec, frozen.residuals, frozen.basis))
        write(self.model, moved)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in moved.pick(HEAD).items():
                parameters[name.module].copy_(tensor)

    def _here(self, basis: State) -> State:
        """Return what is held from the log on its layers' devices; it goes there once, and not in every round."""
        if self._basis[0] is not basis:
            self._basis = (basis, self._placed(basis))
        return self._basis[1]

    def _placed(self, state: State) -> State:
        """Return a state on the devices of the layers and of the head that it is for."""
        places = {name: layer.frozen.weight.device for name, layer in self.layers.items()}
        places |= {name: self.model.get_parameter(name).device for name in self.head}
        return on_devices(state, {name: places.get(name.module, self.device) for name in state})

    @cached_property
    def _unsent(self) -> set[str]:
        return {role.name for role in (*self.spec.roles, self.spec.head) if role.down == "nothing"}

    def _take_turn(self, round_number: int) -> None:
        """Let the factors of a round learn, and no others."""
        self._round = round_number
        if self.spec.turns > 1:
            learn = self.spec.learn(round_number)
            for layer in self.layers.values():
                for role in self.spec.factors:
                    layer.weight_of(role).requires_grad_(role in learn)

    def trainable(self) -> dict[Name, nn.Parameter]:
        """Return the parameters that a client trains in the round whose state is installed, by name."""
        parameters = dict(self.model.named_parameters())
        found: dict[Name, nn.Parameter] = {Name(name, HEAD): parameters[name] for name in self.head}
        for module, layer in self.layers.items():
            for role in self.spec.learn(self._round):
                found[Name(module, role)] = layer.weight_of(role)
        return {name: found[name] for name in sorted(found)}

    @property
    def device(self) -> torch.device:
        """Where the weights are; of a network over several devices the first one, which takes batches and puts out what comes of them."""
        return next(self.model.parameters()).device

    def weights(self) -> Mapping[str, Tensor]:
        """Return the pristine W0 of every adapted layer, viewed (out, in); a quantised one is made when it is looked up, and not kept."""
        return _Weights(self.layers)

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """Return what is made of the pristine weights: once for a key, of which the last is kept, as it may take seconds."""
        if self._made[0] != key:
            self._made = (key, make())
        return cast(Made, self._made[1])

    def frozen_parts(self) -> dict[str, FrozenPart]:
        """Return the frozen part of every adapted layer."""
        return {name: layer.frozen for name, layer in self.layers.items()}

    @property
    def held_as_factors(self) -> frozenset[str]:
        """The adapted layers beside which residuals stand as factors."""
        return frozenset(name for name, layer in self.layers.items() if layer.frozen.rule == FACTORS)


class _Weights(Mapping[str, Tensor]):
    def __init__(self, adapted: Mapping[str, LowRankLayer]) -> None:
        self._layers = adapted

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name].pristine

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
