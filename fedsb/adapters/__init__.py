"""Low-rank adapters: one layer, one spec per family, starts, merge and export. Knows torch and transformers' Conv1D, nothing else."""

from fedsb.adapters.families import SPECS
from fedsb.adapters.layer import (
    NARROW,
    LowRankLayer,
    adapters_off,
    attach,
    layers,
    read,
    release,
    scale_of,
    set_residuals,
    write,
)
from fedsb.adapters.layouts import Layouts
from fedsb.adapters.linear import is_adaptable
from fedsb.adapters.spec import AdapterSpec
from fedsb.adapters.targets import ALL_LINEAR, left_out, match_targets, used_by_hand

__all__ = [
    "ALL_LINEAR",
    "NARROW",
    "SPECS",
    "AdapterSpec",
    "Layouts",
    "LowRankLayer",
    "adapters_off",
    "attach",
    "is_adaptable",
    "layers",
    "left_out",
    "match_targets",
    "read",
    "release",
    "scale_of",
    "set_residuals",
    "used_by_hand",
    "write",
]
