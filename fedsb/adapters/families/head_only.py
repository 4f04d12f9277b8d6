"""No adapters: the classifier head alone is trained. The baseline of private training, where few parameters bear noise best."""

from fedsb.adapters.spec import AdapterSpec

SPEC = AdapterSpec(name="head_only")
