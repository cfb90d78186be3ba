"""One class per Ray actor, in plain Python: what runs where.

Actors import `engines`, `models`, `rewards` and `algorithms`, never Ray or each other's processes;
`ray.remote` wraps them when they are spawned. Read `README.md`, then `learner`.
"""
