"""The elastic pool of generators: states, restarts, the shard queue, idle times, autoscaling.

It calls generators through `rlhf_ray.roles` and starts them through a factory; it imports neither
Ray nor `cluster`. Read `pool` first.
"""
