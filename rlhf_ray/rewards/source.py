"""The interface of a reward source, what sources share, and the sources that run a model."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, ParamSpec, Protocol, TypeVar, cast

import numpy as np

from rlhf_ray.data.reading.chats import Message
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.reading.rows import Row, row_tools
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.types import Prompt, Rollout

P = ParamSpec("P")
T = TypeVar("T")

SequenceScorer = Callable[[Sequence[np.ndarray]], list[float]]
"""[N] sequences of [S] token ids -> [N] scores."""
TextClassifier = Callable[[Sequence[str]], list[Mapping[str, float]]]
"""[N] texts -> for each text, label -> logit."""


class Source(Protocol):
    """Scores responses; built once, in the process of a reward scorer."""

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] raw scores; None: this source does not apply to that response.

        Raises:
            RlhfError: naming the source, what is wrong and the remedy.
        """
        ...


class Blocking:
    """Runs blocking work in a thread of its own, one call after the other.

    The event loop stays free, so requests of other sources continue meanwhile.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def __call__(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Return or raise what ``work`` does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(work, *args, **named))


async def together(work: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """Await all coroutines at once; return their results in order.

    Raises:
        BaseException: the first failure, bare; the other coroutines are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
    except BaseExceptionGroup as failures:
        # Callers expect the family of `errors`, which an exception group would hide.
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def messages_of(prompt: Prompt) -> list[Message] | None:
    """Return the messages before the response if the row was a chat, else None."""
    return prompt.fields.get("messages") or None


def column_of(prompt: Prompt, column: str, source: str) -> object:
    """Return the value of a column of the prompt's row.

    Raises:
        DataError: the row has no such column, or the value is None.
    """
    value = prompt.fields.get(column)
    if value is None:
        raise DataError(
            f"rewards: {source} reads the column {column!r}, which prompt {prompt.id} lacks; it "
            f"has {', '.join(prompt.fields) or 'no further columns'}. Name the column in the "
            "source, or map it in the data set's columns"
        )
    return value


@dataclass(frozen=True)
class TemplateCheck:
    """Requires that a reward model's chat template takes a prompt, given by its fields.

    Raises:
        BadRow: when called: it does not.
    """

    renderer: Renderer
    """Of the reward model."""

    def __call__(self, fields: Row) -> None:
        messages = cast("list[Message] | None", fields.get("messages"))
        if not messages:
            return
        try:
            self.renderer.prompt(messages, tools=row_tools(fields))
        except BadRow as bad:
            raise BadRow(
                f"reward_{bad.reason}",
                "the reward model, whose tokenizer is not the policy's, cannot read the chat: "
                + bad.explanation,
            ) from None


class ModelSource:
    """Scores by a sequence-classification model with one label.

    A model with the policy's tokenizer reads the rollout's own token ids. Any other model reads the
    messages in its own chat template, or the text if the prompt is no chat, cut on the left to its
    longest sequence.
    """

    def __init__(self, scorer: SequenceScorer, renderer: Renderer | None, max_length: int) -> None:
        """
        Args:
            scorer: runs the model.
            renderer: of the reward model's tokenizer; None: same tokenizer as the policy.
            max_length: longest sequence, tokens.
        """
        self._scorer = scorer
        self._renderer = renderer
        self._max_length = max_length
        self._blocking = Blocking()

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] scores. A response that was cut at its limit gets no end of sequence."""
        sequences = [self._tokens(rollout) for rollout in rollouts]
        return [*await self._blocking(self._scorer, sequences)]

    def _tokens(self, rollout: Rollout) -> np.ndarray:
        if self._renderer is None:
            return rollout.sequence_ids
        prompt = rollout.prompt
        ended = rollout.finish_reason == "stop"
        given, renderer = messages_of(prompt) or prompt.text, self._renderer
        try:
            tools = row_tools(prompt.fields)
            try:
                texts = renderer.prompt_and_answer(given, rollout.text, tools=tools)
            except BadRow:  # of the answer as it was sampled, unless the prompt is refused as well
                texts = renderer.continued(given, rollout.text, tools)
        except BadRow as bad:
            raise DataError(
                f"Prompt {prompt.id} cannot be rendered for the reward model, whose tokenizer is "
                f"not the policy's ({bad.reason}): {bad.explanation}"
            ) from bad
        (rendered,) = renderer.tokenize([texts], ended)
        return np.asarray(rendered.token_ids[-self._max_length :], dtype=np.int64)


class ClassifierSource:
    """Scores by the logit of one label of a text-classification model."""

    def __init__(
        self,
        name: str,
        classify: TextClassifier,
        label: str,
        reads: Literal["conversation", "response"],
    ) -> None:
        """
        Args:
            name: of the source.
            classify: runs the model.
            label: label whose logit is the score; case does not matter.
            reads: input of the model.
        """
        self._name = name
        self._classify = classify
        self._label = label
        self._reads = reads
        self._blocking = Blocking()

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] logits of the label."""
        texts = [
            rollout.text if self._reads == "response" else rollout.prompt.text + rollout.text
            for rollout in rollouts
        ]
        return [self._logit(logits) for logits in await self._blocking(self._classify, texts)]

    def _logit(self, logits: Mapping[str, float]) -> float:
        for label, logit in logits.items():
            if label.lower() == self._label.lower():
                return logit
        raise ConfigError(
            f"rewards: {self._name} has no label {self._label!r}; its labels are "
            f"{', '.join(logits)}: name one of them in label"
        )
