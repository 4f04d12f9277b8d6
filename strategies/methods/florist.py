"""FLoRIST (Ramesh, Dass 2025, arXiv:2506.09199): FlexLoRA's rule with the least rank of each module that keeps a share τ of the energy.

There is one pair for all, with all weight on B; a client of a smaller rank than p sees its leading block. What differs from the paper: it
sends p(m + n) values of a module, and p follows from the data; here a message has the layout of the server's rank, so that its bytes
are known before the run, and the components that are cut are directions at weight zero, which can learn.
"""

from strategies.methods.flexlora import FlexLoRA


class FLoRIST(FlexLoRA):
    """Decompose the mean of the products and cut it by its energy; average the head."""
