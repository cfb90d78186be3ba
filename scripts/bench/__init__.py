"""The rows of `scripts/bench.py`, a module for each subject; read rows.py first."""
