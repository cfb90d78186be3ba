"""Answers of one model in this process, whole or word by word."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextIteratorStreamer

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.models.ending import Ending
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled."""

    temperature: float
    """0: always the likeliest token."""
    max_tokens: int
    """Longest answer, tokens."""
    stop_token_ids: tuple[int, ...]
    """Every id that ends an answer."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that hold this share of the probability; 1: all."""
    min_tokens: int = 0
    """Tokens that must be there before an answer ends."""
    stop: tuple[str, ...] = ()
    """An answer ends with the token that completes one of these."""


class TextGenerator:
    """A causal LM, or one with an adapter, that continues prompts.

    Args:
        path: model folder, PEFT folder or hub name.
        settings: how to load it.
        sampling: how to sample.

    Raises:
        DataError: it cannot be loaded.
    """

    def __init__(self, path: str, settings: ModelConfig, sampling: Sampling) -> None:
        self.tokenizer: Any = load_tokenizer(path)
        self._model = load_causal_lm(path, settings)
        if torch.cuda.is_available():
            self._model.cuda()
        # The folder's own would fill in whatever is not set below: penalties, and the like.
        self._model.generation_config = GenerationConfig()
        self._sampling = sampling
        self._settings = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            min_new_tokens=min(sampling.min_tokens, sampling.max_tokens) or None,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_token_id=list(sampling.stop_token_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def answer(self, prompt_ids: Sequence[int], seed: int) -> str:
        """One answer, without special tokens; the same seed gives the same answer."""
        output_S = self._generate(prompt_ids, seed)[0]
        return self.tokenizer.decode(output_S[len(prompt_ids) :], skip_special_tokens=True)

    def stream(self, prompt_ids: Sequence[int], seed: int) -> Iterator[str]:
        """The same answer in pieces of text, each as soon as it is whole words."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[Exception] = []

        def generate() -> None:
            try:
                self._generate(prompt_ids, seed, streamer)
            except Exception as error:  # raised again where the pieces are read
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, name="generate", daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]

    @torch.no_grad()
    def _generate(
        self, prompt_ids: Sequence[int], seed: int, streamer: TextIteratorStreamer | None = None
    ) -> torch.Tensor:
        torch.manual_seed(seed)
        ids_1S = torch.tensor([list(prompt_ids)], device=self._model.device)
        return self._model.generate(
            input_ids=ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            generation_config=self._settings,
            stopping_criteria=[self._ends_at_strings(len(prompt_ids))],
            streamer=streamer,
        )

    def _ends_at_strings(self, num_prompt_tokens: int) -> Callable[..., torch.Tensor]:
        """Which rows end with their last token, as generate() asks for it."""
        ending = Ending(self._sampling.max_tokens, self._sampling.stop)

        def ends(ids_BS: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            rows = ids_BS[:, num_prompt_tokens:].tolist()
            counts = len(rows[0]) > self._sampling.min_tokens
            completed = [counts and ending.is_completed(row, self._spell) for row in rows]
            return torch.tensor(completed, device=ids_BS.device)

        return ends

    def _spell(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)
