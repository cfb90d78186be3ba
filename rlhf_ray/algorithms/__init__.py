"""The mathematics of RLHF as pure functions on tensors, each with shapes, formula and source.

It imports torch, `errors` and `plugins` alone. Read `advantages` and `losses` first; `experience`
puts them together for a batch.
"""
