"""FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463): the mean of A is shared, B stays with its client.

There is no model that the server could evaluate: the clients' own metrics, their mean, spread and worst tenth are what a run tells.
"""

from strategies.base import LowRankStrategy


class FedSALoRA(LowRankStrategy):
    """Average A and the head."""
