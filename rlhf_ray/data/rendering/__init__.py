"""Rows to token ids: one renderer for all stages, and packing of texts into blocks.

May import ``data.reading``, ``data.template``, ``config`` and ``errors``. Read ``render`` first:
every text that a model sees comes out of it.
"""

from rlhf_ray.data.rendering.packing import pack
from rlhf_ray.data.template import full, prompt

__all__ = ["full", "pack", "prompt"]
