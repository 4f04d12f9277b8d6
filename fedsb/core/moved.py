"""Names of modules before the rooms: a script that was written for one of them still finds it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "fedsb.arrays": "fedsb.wire.arrays",
    "fedsb.assembly": "fedsb.app.assembly",
    "fedsb.errors": "fedsb.core.errors",
    "fedsb.evaluation": "fedsb.models.evaluate",
    "fedsb.frozen": "fedsb.wire.frozen",
    "fedsb.loading": "fedsb.models.loading",
    "fedsb.messages": "fedsb.wire.messages",
    "fedsb.rng": "fedsb.core.rng",
    "fedsb.schema": "fedsb.config.schema",
    "fedsb.state": "fedsb.core.state",
    "fedsb.training": "fedsb.models.fit",
}
# What has left the module that took its old one's place.
NAMES = {"fedsb.training": {"collate": "fedsb.models.collating"}}


class _Forwarding(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old name's module under its new one: the same module, and no second copy of it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        self._own = module.__spec__
        for name, home in NAMES.get(spec.name, {}).items():
            setattr(module, name, getattr(importlib.import_module(home), name))
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # which importing had put the old name's in place of


def forward_old_names() -> None:
    """Let old names be imported, once a process."""
    if not any(isinstance(finder, _Forwarding) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Forwarding())
