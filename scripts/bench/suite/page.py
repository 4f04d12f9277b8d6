"""What the page of the comparison says before its figures: the plan."""

from __future__ import annotations

from .contestants import BYTES, FULL_RATES, RATES, REFERENCE_RANK, SEEDS, THE_SAME, TUNING_SEEDS, VALUES
from .texts import MOST, PACKAGES, SHARE, VALIDATION

HEADS = {
    ("bbc", VALUES): "BBC News, equal trained values",
    ("bbc", BYTES): "BBC News, equal bytes",
    ("docstrings", VALUES): "Docstrings by package, equal trained values",
    ("docstrings", BYTES): "Docstrings by package, equal bytes",
}
TUNED = f"chosen of {len(RATES)} rates each, on a validation part, by {len(TUNING_SEEDS)} runs a rate"
LEAD = f"""# Methods compared

`python scripts/bench/methods.py FOLDER --cache docs/methods.json` runs what is missing, a minute of one core a run, and
`python scripts/bench/methods_page.py docs/methods.json docs/methods.md` writes this page. `methods.json` holds every run.

The plan, fixed before the first run of it. (A pilot with constant rates, no clipping and one run a rate chose for FedIT a rate of 0.008, at
which four other seeds ended at an accuracy of 0.06 to 0.73; three further ones under this plan's schedule at 0.84 to 0.92. No run of the
pilot counts.)

- **Model**: MiniLM-L6 (22.7 million weights), all linear layers adapted, texts cut to 32 tokens, passes in
  bfloat16 and adapters in float32, AdamW, its rate
  rising over the first tenth of the run and falling by a cosine over the rest, gradients clipped to norm 1. 10 clients, 5 a round, 8
  rounds of 4 steps of 8 texts. Short runs: what is compared is how far methods come with few examples and few bytes, not where they end.
- **Data**: *bbc*, BBC News by topic, a Dirichlet(0.5) split. *docstrings*, what {len(PACKAGES)} installed packages say of their classes,
  functions and methods, to be told apart by their first sentence; a package is a client, with every {SHARE}th of its docstrings and at most
  {MOST}: a natural split. {VALIDATION} rows of each are set aside for choosing rates; of the rest, each seed draws 30% for the test, of
  which 400 are measured.
- **Budgets**: *equal trained values*: each method at the rank at which a client trains as many values as FedIT (`fedavg_lora`) at rank
  {REFERENCE_RANK}. *Equal bytes*: at the rank at which the whole run moves as many bytes, up, down, start and one-off included; there the
  start from the clients' gradients takes two exchanges at rank + 2, for as it is shipped (four, at rank + 8) it alone moves more than that.
  What `florist` sends down follows the data: its rank is the one whose most is as many, and it moves less.
- **Rates**: the same {len(RATES)} for every method, {", ".join(f"{rate:g}" for rate in RATES)} (for `full`, which moves all weights,
  {", ".join(f"{rate:g}" for rate in FULL_RATES)}): the one with the least mean loss on the validation part, over seeds
  {" and ".join(map(str, TUNING_SEEDS))}.
- **Seeds**: {", ".join(map(str, SEEDS))}: split, draws of clients, batches and starts vary together, and are the same for all methods.
- At one rank for all clients {" and ".join(f"`{one}` is `{other}`" for one, other in THE_SAME.items())} to the bit: they do not
  stand here. `fedsa_lora` and `local_only` have no one model: their accuracy is that of each client on what it holds out, and is not held
  against the others."""
