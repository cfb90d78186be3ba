"""The elastic pool of generators: states, restarts, the shard queue, idle times, autoscaling.

It sees a generator through `rlhf_ray.roles` and a factory that starts processes; it imports neither
Ray nor `cluster`. Read `pool` first.
"""
