"""Everybody's examples at one client, which sees as many of them as the clients of the federation would: what pooled data would reach.

With ``method.adapter=lora_sb`` it is LoRA-SB (Ponkshe et al. 2024, arXiv:2411.19557) as its paper trains it.
"""

from flwr.serverapp import Grid

from fedsb.core.errors import UserError
from strategies.base import LowRankStrategy
from strategies.roster import Roster


class Centralized(LowRankStrategy):
    """Take what the one client trained."""

    def connect(self, grid: Grid) -> Roster:
        """Wait for the one client.

        Raises:
            UserError: it is a real node: what others hold is not to be had there.
        """
        roster = super().connect(grid)
        if not self.simulated:
            raise UserError("method=centralized pools the examples of all clients, which only a simulation can; take another method")
        return roster
