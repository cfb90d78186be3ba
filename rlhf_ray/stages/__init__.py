"""One `run(config)` for each stage of a run; the only room that joins actors, driver and cluster.

Read `pipeline` first, which runs the stages in order, then `ppo.stage`. Below the command line,
a stage may import every room.
"""
