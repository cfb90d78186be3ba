"""A run on disk: its folder, data sets, models and versions, its lineage, branches, control files.

May import cluster, driver and what is below them; stages, jobs, serving, report and doctor build
on it. Read folder.py first, then control.py.
"""
