"""The PPO loop and what it needs: batches, proofs of weight sync, guards, commits, records.

It sees roles through the Protocols of `rlhf_ray.roles` alone and imports `algorithms`, `rewards`
and `observability`, never Ray or an engine. Read `ppo_loop` first.
"""
