"""Ours under ``flwr run``, a round at a time."""
