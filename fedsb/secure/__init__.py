"""Sums whose summands nobody sees: fixed point, masks, shares of keys, and what each side does in an exchange."""
