"""Differential privacy: plans, accounting, ledgers, budgets, and what a run may claim."""
