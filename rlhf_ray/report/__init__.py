"""The HTML report of a run: curves, sample texts, comparisons, timeline, data and config.

Reads nothing but the files in the run's folder. May import observability and config. Read `report`
first: it lists the sections in the order of the page.
"""
