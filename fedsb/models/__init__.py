"""A network with adapters on, and what is done to it: loading, pooling, local training, evaluation."""

from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.pooling import pool_by_mean

__all__ = ["AdaptedModel", "build_model", "pool_by_mean"]
