"""Reward sources: score responses, and combine the scores of several sources into one.

Imports data, algorithms and config, but no models: `engines.scoring` builds the sources and passes
them the models that they run. Read `source` first.
"""
