"""What lies on a device is read and written in one copy, and what the host knows of it is never asked for.

There is no GPU here: ``meta`` stands in for one. A tensor there has no values, so whatever asks for one fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedsb.core.devices import Known, on_device, on_devices, on_host, placed
from fedsb.core.state import Name, State

META = torch.device("meta")
STATE = State({Name("a", "A"): torch.arange(6.0).view(2, 3), Name("a", "B"): torch.ones(4), Name("b", "head"): torch.full((2, 2), 3.0)})


class Crossings(TorchDispatchMode):
    """Counts copies between the CPU and another device, and values on their way up; what comes from one without values comes as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = self.values_up = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        source, target = _ends(function, args, given)
        if source is not None and target is not None and target.type != source.device.type:
            self.up, self.down = self.up + (target.type == "cpu"), self.down + (target.type != "cpu")
            self.values_up += source.numel() if target.type == "cpu" else 0
            if source.device.type == "meta":
                return torch.zeros(source.shape, dtype=given.get("dtype") or source.dtype)
        return function(*args, **given)


COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")  # the last one in inference mode, where it is not taken apart


def _ends(function: Any, args: Sequence[Any], given: Mapping[str, Any]) -> tuple[Tensor | None, torch.device | None]:
    """Return what a function copies, and to where."""
    name = function._schema.name
    if name not in COPIES:
        return None, None
    return (args[1], args[0].device) if name == COPIES[0] else (args[0], given.get("device"))


def test_a_state_goes_to_a_device_and_back_in_one_copy_each_way() -> None:
    with Crossings() as crossings:
        there = on_device(STATE, META)
        assert (crossings.down, crossings.up) == (1, 0)
        back = on_host(there)
        assert (crossings.down, crossings.up) == (1, 1)
    assert {name: t.shape for name, t in there.items()} == {name: t.shape for name, t in STATE.items()}
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in STATE.items()}
    assert all(t.device == META for t in there.values())


def test_what_lies_on_several_devices_takes_one_copy_from_each() -> None:
    where = {name: META if name.module == "a" else torch.device("cpu") for name in STATE}
    with Crossings() as crossings:
        there = on_devices(STATE, where)
        assert (crossings.down, crossings.up) == (1, 0)
        back = on_host(there)
        assert (crossings.down, crossings.up) == (1, 1)
    assert {name: t.device for name, t in there.items()} == where
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in STATE.items()}
    assert torch.equal(back[Name("b", "head")], STATE[Name("b", "head")])
    assert on_devices(STATE, dict.fromkeys(STATE, torch.device("cpu"))) is STATE


def test_a_state_on_the_cpu_goes_nowhere_and_what_comes_back_is_a_copy() -> None:
    assert on_device(STATE, torch.device("cpu")) is STATE
    back = on_host(STATE)
    for name, t in STATE.items():
        assert torch.equal(back[name], t)
        assert back[name].data_ptr() != t.data_ptr()


@pytest.mark.parametrize("padded", [False, True])
def test_what_the_host_knows_is_not_asked_of_the_device(padded: bool) -> None:
    """The questions that transformers asks of a mask and of positions, old and new."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0 if padded else 1]])
    positions = torch.tensor([[0, 1, 0 if padded else 2]])
    batch = placed({"input_ids": mask, "attention_mask": mask, "position_ids": positions}, META)
    known = batch["attention_mask"].to(device=META, dtype=torch.bool)
    assert bool(known.all()) is not padded
    assert bool(torch.all(batch["attention_mask"] == 1)) is not padded
    assert bool(known[:, :3].sum() == known.numel()) is not padded
    begins = (torch.diff(batch["position_ids"], prepend=batch["position_ids"][:, :1] - 1, dim=-1) != 1).cumsum(-1)
    assert bool((begins[:, -1] == 0).all()) is not padded
    assert (0 in batch["input_ids"][:, [-1, 0]]) is padded
    assert int((batch["attention_mask"][:, 1:] != 0).sum()) == 4 - padded


def test_what_is_mixed_with_other_tensors_is_known_no_more() -> None:
    batch = placed({"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)}, META)
    mixed = batch["attention_mask"] * torch.zeros(2, 3, device=META)
    assert type(mixed) is Tensor
    assert type(batch["attention_mask"]) is Known
    with pytest.raises(RuntimeError, match="meta"):
        bool(mixed.all())


def test_on_the_cpu_a_batch_is_left_as_it_is() -> None:
    batch = {"attention_mask": torch.ones(2, 3)}
    assert placed(batch, torch.device("cpu"))["attention_mask"] is batch["attention_mask"]
