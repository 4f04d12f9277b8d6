"""A federation over TLS on one machine, what its nodes cost by CPU time, and Flower's own echo beside it."""
