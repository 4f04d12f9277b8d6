"""Contestants of ``simulation.py``: each does rounds of one workload as it is told to."""
