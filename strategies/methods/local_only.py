"""Each client trains alone, and nothing travels: what a federation has to beat for each of those who take part in it.

There is no model that the server could evaluate: the clients' own metrics, their mean, spread and worst tenth are what a run tells.
"""

from strategies.base import LowRankStrategy


class LocalOnly(LowRankStrategy):
    """Average nothing."""
