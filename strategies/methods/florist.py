"""FLoRIST (Ramesh, Dass 2025, arXiv:2506.09199): FlexLoRA's rule with the least rank of each module that keeps a share τ of the energy.

There is one pair for all, with all weight on B, and p (m + n) values of a module come down, p as the data have it; a client of a smaller
rank than p is sent its leading block. Clients train and send their own rank: beside the p components that were sent stand others at weight
zero, whose rows of A are drawn from the run's seed, by the server as by the client.
"""

from strategies.methods.flexlora import FlexLoRA


class FLoRIST(FlexLoRA):
    """Decompose the mean of the products and cut it by its energy; average the head."""
