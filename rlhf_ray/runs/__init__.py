"""A run on disk: its folder, its data sets and models, where they come from, its control files.

May import cluster, driver and what is below them; stages, jobs, serving, report and doctor build
on it. Read folder.py first, then control.py.
"""
