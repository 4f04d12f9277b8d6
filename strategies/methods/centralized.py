"""Everybody's examples at one client, which sees as many of them as the clients of the federation would: what pooled data would reach.

With ``method.adapter=lora_sb`` it is LoRA-SB (Ponkshe et al. 2024, arXiv:2411.19557) as its paper trains it. A simulation alone can do so.
"""

from strategies.base import LowRankStrategy


class Centralized(LowRankStrategy):
    """Take what the one client trained."""
