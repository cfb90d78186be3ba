"""vLLM as a generation engine. Imports vllm itself; read `engine` first.

`worker_extension` runs inside vLLM's worker processes.
"""
