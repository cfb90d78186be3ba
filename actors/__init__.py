"""One class per Ray actor, in plain Python.

Actors import `engines`, `models`, `rewards` and `algorithms`, never Ray, and never call each other;
`ray.remote` wraps them when they are spawned. Read `README.md`, then `learner`.
"""

from rlhf_ray.observability.quiet import put_compiling_off

put_compiling_off()  # before a role's module imports peft
