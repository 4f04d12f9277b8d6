"""From a configuration to a run: its parts, its start, its privacy, its listener, its export."""
