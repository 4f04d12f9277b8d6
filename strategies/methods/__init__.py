"""The methods, one file each, by the name that ``method=`` takes."""

from strategies.base import LowRankStrategy
from strategies.methods.abba import ABBA
from strategies.methods.abba_alternating import ABBAAlternating
from strategies.methods.abba_core import ABBACore
from strategies.methods.abba_masked import ABBAMasked
from strategies.methods.centralized import Centralized
from strategies.methods.fed_sb import FedSB
from strategies.methods.fedask import FedASK
from strategies.methods.fedavg_lora import FedAvgLoRA
from strategies.methods.fedex_lora import FedExLoRA
from strategies.methods.fedmomentum import FedMomentum
from strategies.methods.fedrot_lora import FedRotLoRA
from strategies.methods.fedsa_lora import FedSALoRA
from strategies.methods.fedsvd import FedSVD
from strategies.methods.ffa_lora import FFALoRA
from strategies.methods.flexlora import FlexLoRA
from strategies.methods.flora import FLoRA
from strategies.methods.florist import FLoRIST
from strategies.methods.frlora import FRLoRA
from strategies.methods.full import FullFineTuning
from strategies.methods.head_only import HeadOnly
from strategies.methods.hetlora import HetLoRA
from strategies.methods.local_only import LocalOnly
from strategies.methods.lora_fair import LoRAFAIR
from strategies.methods.lora_one import LoRAOne
from strategies.methods.lora_xs import LoRAXS
from strategies.methods.nested_fed_sb import NestedFedSB
from strategies.methods.raflora import RaFLoRA
from strategies.methods.ravan import RAVAN
from strategies.methods.rolora import RoLoRA
from strategies.methods.untouched import Untouched

STRATEGIES: dict[str, type[LowRankStrategy]] = {
    "fed_sb": FedSB,
    "fedavg_lora": FedAvgLoRA,
    "fedex_lora": FedExLoRA,
    "fedrot_lora": FedRotLoRA,
    "lora_fair": LoRAFAIR,
    "fedsa_lora": FedSALoRA,
    "fedsvd": FedSVD,
    "ffa_lora": FFALoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "florist": FLoRIST,
    "raflora": RaFLoRA,
    "hetlora": HetLoRA,
    "rolora": RoLoRA,
    "frlora": FRLoRA,
    "fedmomentum": FedMomentum,
    "fedask": FedASK,
    "nested_fed_sb": NestedFedSB,
    "lora_one": LoRAOne,
    "lora_xs": LoRAXS,
    "ravan": RAVAN,
    "abba": ABBA,
    "abba_masked": ABBAMasked,
    "abba_alternating": ABBAAlternating,
    "abba_core": ABBACore,
    "head_only": HeadOnly,
    "full": FullFineTuning,
    "local_only": LocalOnly,
    "centralized": Centralized,
    "untouched": Untouched,
}
