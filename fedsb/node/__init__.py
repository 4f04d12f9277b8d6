"""A real node: what its operator allows, and the data that are its own."""
