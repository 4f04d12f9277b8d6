"""Parts of ``methods.py``: who takes part, on which data, at which budget, and what is kept of each run."""
