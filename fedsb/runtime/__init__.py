"""Where a federation runs: in this process, or in a private Flower simulation."""
