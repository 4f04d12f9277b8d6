"""Sweeps: the jobs of a grid in one folder, what has become of each, and how they run side by side."""
