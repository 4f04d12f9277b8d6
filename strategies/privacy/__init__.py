"""Client-level privacy: clipped updates and noise at the server."""
