"""The worker that a node's operator runs beside a SuperNode, and the relay that takes Flower's messages to it over a Unix socket."""
