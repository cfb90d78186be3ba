"""Checks of what only a GPU can show: scripts/gpu_check.sh runs them all, tests/gpu one by one.

Read `cases`, the table of what is checked; `running` runs each case as a process with a time
limit. Where there is no GPU, what needs none runs on tiny models, and the rest says what it would
do.
"""
