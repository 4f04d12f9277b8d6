"""A run's model for others to load: an adapter or a head at its end, and other formats when somebody asks."""
