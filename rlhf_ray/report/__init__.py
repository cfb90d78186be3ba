"""The HTML report of a run: story, curves, texts, time and cost, comparisons, data and config.

Reads nothing but the files in the run's folder. May import observability and config. Read `report`
first: it lists the sections in the order of the page.
"""
