"""A Flower app for LoRA as the tutorials write it."""
