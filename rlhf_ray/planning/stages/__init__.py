"""What each stage of a run takes: hours, memory of a process, disk.

Read `estimates` first: `stage_estimates` goes through `run.stages` with hours and disk.
"""
