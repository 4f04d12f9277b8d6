"""Several clients in one pass over one frozen model."""
