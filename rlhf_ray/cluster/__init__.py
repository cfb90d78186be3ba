"""Everything that needs Ray: its session, the workers of roles, colocation and orphan cleanup.

The rest of the code sees workers through the protocols of `rlhf_ray.roles`. May import generators,
placement, observability and the modules below them. Read session.py first, then spawner.py.
"""
