"""One class per Ray actor, in plain Python.

Actors import `engines`, `models`, `rewards` and `algorithms`, never Ray, and never call each other;
`ray.remote` wraps them when they are spawned. Read `README.md`, then `learner`.
"""
