"""Datasets: files and hubs to rows, rows to token ids, and what each stage trains on.

May import ``observability``, ``types``, ``config``, ``errors`` and ``plugins``, never models or
Ray. Read ``reading.sources`` first, then ``rendering.render``.
"""
