"""Federated low-rank fine-tuning of language models on Flower."""

from fedsb.core.moved import forward_old_names

__version__ = "0.1.0"
forward_old_names()
