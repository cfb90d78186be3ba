"""Files for Grafana and Prometheus, generated from the registry of metrics.

Imports nothing but observability. Read `files` first: it writes everything.
"""
