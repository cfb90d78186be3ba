"""The stage evaluate: which of the run's models is better, and how sure that is.

Read `stage` first: inputs, then the answers of every model, their comparison and its records.
It serves models with the roles of `stages.ppo`; `ranking` is arithmetic and imports NumPy alone.
"""
