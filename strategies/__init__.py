"""Server side: one Flower ``Strategy`` subclass per method, over :class:`LowRankStrategy`."""

from strategies.base import LowRankStrategy
from strategies.methods.fed_sb import FedSB
from strategies.methods.fedavg_lora import FedAvgLoRA
from strategies.methods.fedex_lora import FedExLoRA
from strategies.methods.head_only import HeadOnly
from strategies.participation import Participation

STRATEGIES: dict[str, type[LowRankStrategy]] = {
    "fed_sb": FedSB,
    "fedavg_lora": FedAvgLoRA,
    "fedex_lora": FedExLoRA,
    "head_only": HeadOnly,
}

__all__ = ["STRATEGIES", "FedAvgLoRA", "FedExLoRA", "FedSB", "HeadOnly", "LowRankStrategy", "Participation"]
