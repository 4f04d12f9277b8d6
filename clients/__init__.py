"""Client side: local training and evidence for the start."""

from clients.evidence import dense_gradients, sketch_gradients
from clients.local import draw_evidence, evaluate_round, give_evidence

__all__ = ["dense_gradients", "draw_evidence", "evaluate_round", "give_evidence", "sketch_gradients"]
