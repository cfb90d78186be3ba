"""Rows of user datasets, whatever their file type and columns, as one table on disk.

May import ``data.stack_exchange``, ``data.template``, ``config``, ``errors`` and ``plugins``. Read
``rows`` (what a row is) and ``sources`` (how rows are loaded) first.
"""
