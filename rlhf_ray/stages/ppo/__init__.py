"""The stage ppo: wires actors, data and checkpoints into the loop of `driver.ppo_loop`.

Read `stage` first, then `roles`, which spawns the actors. The stages reward and evaluate spawn
their scorers and generators from here, too.
"""
