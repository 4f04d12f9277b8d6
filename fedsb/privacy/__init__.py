"""Accounting, ledgers and budgets. No mechanism is there yet, so no epsilon is claimed anywhere."""
