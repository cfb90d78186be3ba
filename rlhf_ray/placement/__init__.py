"""Placement of workers on GPUs: hardware, the layout as arithmetic, Ray's placement groups.

May import config, errors and Ray; layout.py and bundles.py need no Ray, so that `plan` and the
tests can use them anywhere. Read layout.py first, then groups.py.
"""
