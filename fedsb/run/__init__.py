"""The folder of a run: its records, checkpoints and story, and how a run goes on that was ended."""
