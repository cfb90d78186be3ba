"""Checks of this machine, of a cluster's nodes and of a run's inputs, each with what to do.

preflight.py and nvidia_driver.py also run as plain files before anything is installed, so they use
the standard library alone. May import runs, cluster and what is below them. Read preflight.py
first, then cluster.py.
"""
