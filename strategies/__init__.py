"""Server side: one Flower ``Strategy`` subclass per method, over :class:`LowRankStrategy`, each importable from here by its name."""

from strategies.base import LowRankStrategy
from strategies.methods import STRATEGIES
from strategies.participation import Participation

__all__ = ["STRATEGIES", "LowRankStrategy", "Participation"]


def __getattr__(name: str) -> type[LowRankStrategy]:
    """Return a method's class: the table of methods is the one place that knows them."""
    for strategy in STRATEGIES.values():
        if strategy.__name__ == name:
            return strategy
    raise AttributeError(f"module 'strategies' has no attribute '{name}'")
