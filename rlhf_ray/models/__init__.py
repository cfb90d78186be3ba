"""transformers models: load and save them, attach and merge adapters, run forward passes.

Imports data, algorithms and config; knows no rewards, engines or Ray. Read `loading` first, then
`token_logprobs`, where a training step spends its memory.
"""
