"""Keys, values and composition: the typed configuration, what it may hold, and how Hydra puts it together."""

from fedsb.config.compose import load

__all__ = ["load"]
