"""The recorded samples of PPO: ``ppo/completions.jsonl``, and the index by which it is searched.

Read `index` first: what a row of the index holds. `writing` appends and cuts back; `reading`
filters, sorts and pages in memory that does not grow with the run.
"""
