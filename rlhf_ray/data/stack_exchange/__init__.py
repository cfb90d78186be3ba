"""Stack Exchange: readers of its data dump in bounded memory, and a synthetic site of that form.

May import ``config`` and ``errors``. Read ``posts`` first, then ``parts`` and ``grouping``.
"""

from rlhf_ray.data.stack_exchange.grouping import read_posts
from rlhf_ray.data.stack_exchange.posts import answer_score, html_to_markdown, sample_pairs
from rlhf_ray.data.stack_exchange.synthetic_site import gold_score, write_posts

__all__ = [
    "answer_score",
    "gold_score",
    "html_to_markdown",
    "read_posts",
    "sample_pairs",
    "write_posts",
]
