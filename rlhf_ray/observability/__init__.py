"""Metrics, progress, traces and trackers: how a run is measured and shown.

Every room but algorithms may import this one; it imports only config, errors and types. Read
`registry` first: it lists every metric that a run logs.
"""
