"""Arithmetic of a run before it starts: memory, placement, time, and what would make it fit.

May import placement, models, runs and cluster's constants; starts nothing. Read `prediction` first:
its `prediction` goes through shapes, roles, memory and throughput in order; `stages` has what each
stage of the run takes.
"""
