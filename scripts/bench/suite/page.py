"""What the page of the comparison says before its figures: the plan."""

from __future__ import annotations

from .contestants import (
    AT_CLIENTS,
    BYTES,
    FINALISTS,
    FULL_RATES,
    OWN_SCALE,
    RATES,
    REFERENCE_RANK,
    SCALE,
    SEEDS,
    THE_SAME,
    TUNING_SEEDS,
    VALUES,
)  # fmt: skip
from .texts import MOST, PACKAGES, SHARE, VALIDATION

HEADS = {
    ("bbc", VALUES): "BBC News, equal trained values",
    ("bbc", BYTES): "BBC News, equal bytes",
    ("docstrings", VALUES): "Docstrings by package, equal trained values",
    ("docstrings", BYTES): "Docstrings by package, equal bytes",
}
TARGET = "Equal quality is FedIT's own at the end."
TUNED = f"chosen of {len(RATES)} rates each, on a validation part, by {len(TUNING_SEEDS)} seeds"
LEAD = f"""# Methods compared

`python scripts/bench/methods.py FOLDER --cache docs/methods.json` runs what is missing, a quarter of a minute of one core a run, and
`python scripts/bench/methods_page.py docs/methods.json docs/methods.md` writes this page. `methods.json` holds every run, with
the versions, the commit and the hash of the data that it was made with.

The plan, fixed before the first run of it. (A pilot with constant rates, no clipping and one run a rate chose for FedIT a rate of 0.008, at
which four other seeds ended at an accuracy of 0.06 to 0.73; three further ones under this plan's schedule at 0.84 to 0.92. No run of the
pilot counts.)

- **Model**: MiniLM-L6 (22.7 million weights), all linear layers adapted, texts cut to 32 tokens, passes in bfloat16 and adapters in
  float32, AdamW, its rate (of the head too) rising over the first tenth of the run and falling by a cosine over the rest, gradients
  clipped to norm 1. 10 clients, 5 a round, 8 rounds of 4 steps of 8 texts. Short runs: what is compared is how far methods come with few
  examples and few bytes, not where they end.
- **Scale**: all of LoRA, Fed-SB and RAVAN at s = {SCALE:g}, whatever the rank. ({", ".join(f"`{name}`" for name in OWN_SCALE)} keep the s
  of their papers: √(r₁r₂), and 16 / √rank with γ = 128.)
- **Data**: *bbc*, BBC News by topic, a Dirichlet(0.5) split. *docstrings*, what {len(PACKAGES)} installed packages say of their classes,
  functions and methods, to be told apart by their first sentence; a package is a client, with every {SHARE}th of its docstrings and at most
  {MOST}: a natural split of ten. {VALIDATION} rows of each are set aside for choosing rates, and are in no training and no test part of the
  comparison; of the rest, each seed draws 30% for the test, of which 400 are measured, the same for all methods. Each client holds a fifth
  of its own part out, and trains on the rest.
- **Budgets**: *equal trained values*: each method at the rank at which a client trains as many values as FedIT (`fedavg_lora`) at rank
  {REFERENCE_RANK}. *Equal bytes*: at the rank at which the whole run moves as many bytes, up, down, start and one-off included; there the
  start from the clients' gradients takes two exchanges at rank + 2, for as it is shipped (four, at rank + 8) it alone moves more than that.
  What `florist` sends down follows the data: its rank is the one whose most is as many, and it moves less. In the bytes of `fedsa_lora` are
  what its clients' measurements take.
- **Rates**: the same {len(RATES)} for every method, {", ".join(f"{rate:g}" for rate in RATES)} (for `full`, which moves all weights,
  {", ".join(f"{rate:g}" for rate in FULL_RATES)}), by one rule for all: each runs with seed {TUNING_SEEDS[0]}, the {FINALISTS} of the least
  loss on the validation part run with seed {TUNING_SEEDS[1]} too, and the one with the least mean of the two losses is taken. A run that
  fails has an infinite loss.
- **Seeds**: {", ".join(map(str, SEEDS))}: split, draws of clients, batches and starts vary together, and are the same for all methods.
- At one rank for all clients {" and ".join(f"`{one}` is `{other}`" for one, other in THE_SAME.items())} to the bit: they do not
  stand here. In `local_only` a client trains in the rounds that draw it, as elsewhere. `fedsa_lora` and `local_only` have no one model:
  their accuracy is that of each client on what it holds out (their rate is chosen by these under the two other seeds, whose held-out rows
  may be test rows here), and is not held against the others but
  against {" and ".join(f"*{name}*" for name in AT_CLIENTS)}: the same runs again,
  measured there too."""
