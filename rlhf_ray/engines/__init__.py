"""Engines that actors drive: generation (vLLM, transformers, fake) and training (DeepSpeed, torch).

Imports models, rewards and what is below; only this room imports vllm and deepspeed. Read
`protocols` first.
"""
