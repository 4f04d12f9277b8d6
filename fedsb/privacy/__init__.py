"""Differential privacy: plans, accounting, ledgers, budgets, and what a run may claim."""

import logging

# Opacus configures the root logger at import: the log of every library would go to standard output. Where there is a handler it does not.
logging.getLogger().addHandler(logging.NullHandler())
