"""Runs that are jobs of a Ray cluster: submit, list, status, logs, stop and scale.

Everything goes through the job server behind the dashboard's address; a run in a folder of this
machine is handled through its control files instead. May import runs, cluster and what is below
them. Read run_handles.py first, then job_server.py.
"""
