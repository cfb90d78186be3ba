"""Local web pages about a run, served on loopback with a token in the address.

Read `server` first: who may ask, and what every answer carries; then `view`, the pages of
`rlhf-ray view`, `versions`, that of `rlhf-ray chat --page`, and `rank`, that of `rlhf-ray rank`.
"""
