"""The mathematics of RLHF as pure functions on tensors, each with shapes, formula and source.

It imports only torch, `config`, `errors` and `plugins`. Read `advantages` and `losses` first;
`experience` applies them to a batch.
"""
