"""Rows of log-probs by chunks of hidden states: memory and time beside the whole logits.

One sequence goes forward and backward through a one-layer Llama with a LoRA adapter, so that the
output layer is nearly all there is to do.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.figures import ROUNDS, Figure, of_rounds
from bench.running import Place
from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.algorithms.logprobs import token_logprobs
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.forward import causal_lm_logits
from rlhf_ray.models.token_logprobs import answer_with_logprobs, chunked_logprobs

GIB = 2**30
TOKENS, LONG = 500, 8_000
VOCABULARY, QUICK_VOCABULARY = 250_000, 50_000
HIDDEN = 64
Logprobs = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Cost:
    """Cost of one forward and backward pass."""

    gib: float
    seconds: float


def chunks(place: Place) -> list[Figure]:
    """Return memory and time by chunks, as shares of those of the whole logits."""
    vocabulary = QUICK_VOCABULARY if place.quick else VOCABULARY
    model = _build(vocabulary, TOKENS + 1)
    place.begin(ROUNDS + 1)
    for way in (_by_chunks, _by_whole_logits):
        _measure(way, model, 16)  # what is made once
    place.step()
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for index in range(ROUNDS):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            way = (_by_chunks, _by_whole_logits)[which]
            costs[which].append(_measure(way, model, TOKENS))
        place.step()
    pairs = list(zip(*costs, strict=True))
    memory = of_rounds([ours.gib / whole.gib for ours, whole in pairs], vocabulary=vocabulary)
    seconds = of_rounds([ours.seconds / whole.seconds for ours, whole in pairs])
    return [memory, seconds]


def long(place: Place) -> list[Figure]:
    """Return the GiB that one long response takes by chunks."""
    model = _build(VOCABULARY, LONG + 1)
    place.begin(1)
    _measure(_by_chunks, model, 16)
    cost = _measure(_by_chunks, model, LONG)
    place.step()
    return [Figure(cost.gib, details={"seconds": cost.seconds})]


def _by_chunks(model: Any, *batch: Tensor) -> Tensor:
    """Compute log-probs as the learners do."""
    (logprobs_BT,) = chunked_logprobs(model, *batch)
    return logprobs_BT


def _by_whole_logits(
    model: Any, sequences_BS: Tensor, attention_BS: Tensor, prompts_B: Tensor, tokens_BT: Tensor
) -> Tensor:
    """Compute them the plain way."""
    logits_BSV = causal_lm_logits(model)(sequences_BS, attention_BS)
    return token_logprobs(response_logits(logits_BSV, prompts_B, tokens_BT.shape[1]), tokens_BT)


def _measure(logprobs: Logprobs, model: Any, num_tokens: int) -> Cost:
    """Return the growth of this process's peak memory, and the time, of one sequence."""
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
    """Return bytes, as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def _build(vocabulary: int, positions: int) -> Any:
    """Return a random Llama of one layer with tied embeddings, and an adapter."""
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    base = answer_with_logprobs(LlamaForCausalLM(shape))
    return attach(base, LoraConfig(), "CAUSAL_LM", seed=0, dropout=0.0).eval()
