"""Both sides of a federation over TLS: what each keeps in a folder, and the processes that run from it."""
