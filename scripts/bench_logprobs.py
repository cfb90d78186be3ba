#!/usr/bin/env python
"""Memory and time of log-probs by chunks of hidden states, against those of the whole logits.

Usage: python scripts/bench_logprobs.py [--tokens N] [--vocabulary V] [--hidden D]

One sequence goes forward and backward through a one-layer Llama with a LoRA adapter, so that the
output layer is nearly all there is to do. Exits with 1 when the growth is above --limit-gib.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.algorithms.logprobs import token_logprobs
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.forward import causal_lm_logits
from rlhf_ray.models.token_logprobs import answer_with_logprobs, chunked_logprobs

GIB = 2**30
Logprobs = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Cost:
    """Cost of one forward and backward pass."""

    gib: float
    seconds: float


def by_chunks(model: Any, *batch: Tensor) -> Tensor:
    """Compute log-probs as the learners do."""
    (logprobs_BT,) = chunked_logprobs(model, *batch)
    return logprobs_BT


def by_whole_logits(
    model: Any, sequences_BS: Tensor, attention_BS: Tensor, prompts_B: Tensor, tokens_BT: Tensor
) -> Tensor:
    """The plain way."""
    logits_BSV = causal_lm_logits(model)(sequences_BS, attention_BS)
    return token_logprobs(response_logits(logits_BSV, prompts_B, tokens_BT.shape[1]), tokens_BT)


def measure(logprobs: Logprobs, model: Any, num_tokens: int) -> Cost:
    """Growth of this process's peak memory, and time, of one sequence behind one token."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, model.config.vocab_size, (1, num_tokens + 1), generator=generator)
    batch = (ids_BS, torch.ones_like(ids_BS), torch.ones(1, dtype=torch.long), ids_BS[:, 1:])
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    started = time.perf_counter()
    logprobs(model, *batch).sum().backward()
    seconds = time.perf_counter() - started
    return Cost((_memory("VmHWM") - before) / GIB, seconds)


def _memory(field: str) -> int:
    """Bytes, as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def build(vocabulary: int, hidden: int, positions: int) -> Any:
    """A random Llama of one layer with tied embeddings, and an adapter."""
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    base = answer_with_logprobs(LlamaForCausalLM(shape))
    return attach(base, LoraConfig(), "CAUSAL_LM", seed=0, dropout=0.0).eval()


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=250_000, help="entries")
    parser.add_argument("--tokens", type=int, default=8_000, help="of the response")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model")
    parser.add_argument("--compared", type=int, default=500, help="tokens of the comparison")
    parser.add_argument("--limit-gib", type=float, default=1.0, help="most growth, GiB")
    given = parser.parse_args()
    model = build(given.vocabulary, given.hidden, given.tokens + 1)
    measure(by_chunks, model, 16)  # what is made once
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads; vocabulary "
        f"{given.vocabulary}, width {given.hidden}, fp32"
    )
    long = _report("chunks", given.tokens, measure(by_chunks, model, given.tokens))
    chunks = _report("chunks", given.compared, measure(by_chunks, model, given.compared))
    whole = _report("whole logits", given.compared, measure(by_whole_logits, model, given.compared))
    print(
        f"chunks : whole at {given.compared} tokens: memory {chunks.gib / whole.gib:.2f}, "
        f"time {chunks.seconds / whole.seconds:.2f}"
    )
    return int(long.gib > given.limit_gib)


def _report(way: str, num_tokens: int, cost: Cost) -> Cost:
    print(f"{way:>12} {num_tokens:>6} tokens: {cost.gib:6.2f} GiB more, {cost.seconds:6.1f} s")
    return cost


if __name__ == "__main__":
    sys.exit(main())
