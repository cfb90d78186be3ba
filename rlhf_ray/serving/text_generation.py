"""Samples from one of a run's models in this process, whole or as a stream of words."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextIteratorStreamer

from rlhf_ray.config import Config
from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.data.reading.chats import Message
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import decode_after
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import is_adapter
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer, on_device, with_adapter
from rlhf_ray.models.stop_conditions import CONTEXT, StopConditions, stop_token_ids
from rlhf_ray.placement.hardware import hide_gpus
from rlhf_ray.runs.models import RunModel


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling."""

    temperature: float
    """0: always the likeliest token."""
    max_tokens: int
    """Longest answer, tokens."""
    stop_token_ids: tuple[int, ...]
    """Ids that end an answer."""
    top_k: int = 0
    """Number of likeliest tokens to sample from; 0: all."""
    top_p: float = 1.0
    """Share of the probability that the likeliest tokens to sample from hold; 1: all."""
    min_tokens: int = 0
    """Shortest answer, tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, at the token that completes one of them."""


class TextGenerator:
    """A causal LM, with or without an adapter, that continues prompts.

    Versions of a run share its base: `switch` replaces the adapter, so that any number of them
    takes the memory of one.

    Raises:
        DataError: it cannot be loaded.
    """

    def __init__(self, path: str, settings: ModelConfig, sampling: Sampling) -> None:
        self.tokenizer = load_tokenizer(path, settings)
        self._model: Any = on_device(load_causal_lm(path, settings))  # generate() has no types
        # generate() fills in what is not set below from the folder's generation config, such as
        # penalties that rollouts do not have.
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

    def switch(self, path: str) -> None:
        """Continue with another adapter on the same base, or with the base itself.

        Args:
            path: PEFT folder on the base, or the base's own.

        Raises:
            DataError: the adapter is unreadable or does not fit.
        """
        base = self._model.unload() if isinstance(self._model, PeftModel) else self._model
        self._model = base.eval()
        if is_adapter(path):
            self._model = on_device(with_adapter(base, path))

    def answer(self, prompt_ids: Sequence[int], seed: int) -> str:
        """Sample an answer, without special tokens; the same seed gives the same answer."""
        return self.sample(prompt_ids, seed)[1]

    def sample(self, prompt_ids: Sequence[int], seed: int) -> tuple[list[int], str]:
        """Sample an answer as `answer` does; return its token ids, the last one too, and it."""
        output_S = self._generate(prompt_ids, seed)[0]
        ids = output_S[len(prompt_ids) :].tolist()
        return ids, decode_after(self.tokenizer, prompt_ids, ids, skip_special_tokens=True)

    def stream(self, prompt_ids: Sequence[int], seed: int) -> Iterator[str]:
        """Yield the same answer in pieces of text, each as soon as its characters are complete."""
        streamer = _AnswerStreamer(self.tokenizer, prompt_ids)
        failures: list[Exception] = []

        def generate() -> None:
            try:
                self._generate(prompt_ids, seed, streamer)
            except Exception as error:  # raised again below, in the thread that reads the stream
                failures.append(error)
                streamer.end()  # else the reader would wait forever

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
            stopping_criteria=[self._stop_criterion(prompt_ids)],
            streamer=streamer,
        )

    def _stop_criterion(self, prompt_ids: Sequence[int]) -> Callable[..., torch.Tensor]:
        """Return a stopping criterion of generate(): the rows that end with their last token."""
        stop = StopConditions(self._sampling.max_tokens, self._sampling.stop)
        spell = partial(decode_after, self.tokenizer, prompt_ids[-CONTEXT:])

        def ends(ids_BS: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            rows = ids_BS[:, len(prompt_ids) :].tolist()
            may_end = len(rows[0]) > self._sampling.min_tokens
            completed = [may_end and stop.completes_string(row, spell) for row in rows]
            return torch.tensor(completed, device=ids_BS.device)

        return ends


class _AnswerStreamer(TextIteratorStreamer):
    """Yields the text of an answer as it continues its prompt, spaces at its start included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._prompt_ids = prompt_ids
        self._ids: list[int] = []
        self._text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's tokens first, and then each new one."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self._ids += value.flatten().tolist()
        text = decode_after(self.tokenizer, self._prompt_ids, self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Show a last character of which bytes are missing too."""
        text = decode_after(self.tokenizer, self._prompt_ids, self._ids, skip_special_tokens=True)
        self._show(text, stream_end=True)

    def _show(self, text: str, stream_end: bool = False) -> None:
        self.on_finalized_text(text[len(self._text) :], stream_end=stream_end)
        self._text = text


def resolve_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> TemplateConfig:
    """Return the template of a conversation.

    In training, rows decide about ``auto``. A conversation has none, so ``auto`` is Question/Answer
    if the run trains on what prepare wrote in that layout, or if there is no chat template.
    """
    if config.template.kind != "auto":
        return config.template
    prepared = config.data.prompts is None and (Path(config.run.dir) / "prepare").is_dir()
    kind = "question_answer" if prepared or not tokenizer.chat_template else "chat"
    return config.template.model_copy(update={"kind": kind})


def load_generator(
    config: Config,
    model: RunModel,
    *,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> TextGenerator:
    """Load a model of the run, ready to answer.

    Answers end at stop tokens and after ``max_tokens``. ``rollout.ignore_eos`` and
    ``rollout.length_sampler`` are for training and have no effect here.

    Raises:
        DataError: it cannot be loaded.
    """
    hide_gpus(config)
    sampling = Sampling(
        temperature=config.rollout.temperature if temperature is None else temperature,
        max_tokens=max_tokens or config.rollout.max_tokens,
        stop_token_ids=stop_token_ids(model.base, config.template, config.model),
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        min_tokens=config.rollout.min_tokens,
        stop=tuple(config.rollout.stop),
    )
    return TextGenerator(model.path, config.model, sampling)


class Generators:
    """Answers of several models of a run, one at a time; those on one base share it in memory.

    Raises:
        DataError: a model cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """The arguments are those of `load_generator`."""
        self._load = partial(load_generator, config, temperature=temperature, max_tokens=max_tokens)
        self._loaded: dict[str, TextGenerator] = {}
        self._served: dict[str, str] = {}

    def of(self, model: RunModel) -> TextGenerator:
        """Return what answers as a model until the next call."""
        base = model.base
        if is_adapter(base):  # an adapter on an adapter has its base to itself
            base = model.path
        if base not in self._loaded:
            self._loaded[base] = self._load(model)
        elif self._served[base] != model.path:
            self._loaded[base].switch(model.path)
        self._served[base] = model.path
        return self._loaded[base]


def prompt_ids(
    config: Config, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> list[int]:
    """Return the token ids of a conversation, up to where the answer follows.

    Raises:
        DataError: the chat template cannot render it.
    """
    renderer = Renderer(tokenizer, resolve_template(config, tokenizer))
    try:
        text = renderer.prompt(list(messages))
    except BadRow as bad:
        raise DataError(
            f"The template cannot render this conversation ({bad.reason}): {bad.explanation}. Set "
            "template.kind to question_answer, or change the chat template"
        ) from bad
    return renderer.tokenize([text], ended=False)[0].token_ids
