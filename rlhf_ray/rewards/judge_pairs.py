"""AI feedback on pairs: a judge says which of two answers is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.judge import Chat, conversation, fill, last_match
from rlhf_ray.types import Prompt

Side = Literal["a", "b"]
Verdict = Literal["a", "b", "order", "unread"]
"""Which answer is better. order: whichever stands in one place; unread: no A or B was found."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt."""

    prompt: Prompt
    """Text and columns; its tokens are not read."""
    a: str
    """One answer."""
    b: str
    """The other."""


class PairJudge:
    """Compares answers."""

    def __init__(self, name: str, config: PairJudgeConfig) -> None:
        """Args: who asks, for messages; the judge."""
        self._name = name
        self._config = config
        self._chat = Chat(name, config)

    async def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict a pair, in order.

        Raises:
            RlhfError: the judge stayed down, or gave no verdict where that is an error.
        """
        questions = [self._question(pair, pair.a, pair.b) for pair in pairs]
        if self._config.both_orders:
            questions += [self._question(pair, pair.b, pair.a) for pair in pairs]
        answers = await self._chat.answers(questions)
        read: list[Side | None] = [self._read(answer) for answer in answers]
        if not self._config.both_orders:
            return [verdict or "unread" for verdict in read]
        straight, swapped = read[: len(pairs)], read[len(pairs) :]
        return [_agreed(*both) for both in zip(straight, swapped, strict=True)]

    def _question(self, pair: Pair, a: str, b: str) -> str:
        values = {"prompt": conversation(pair.prompt), "a": a, "b": b}
        return fill(self._config.template, values, pair.prompt, self._name)

    def _read(self, answer: str) -> Side | None:
        found = (last_match(self._config.pattern, answer) or "").lower()
        if found == "a":
            return "a"
        if found == "b":
            return "b"
        if self._config.on_bad_answer == "error":
            raise RlhfError(
                f"{self._name} gave no A or B that pattern {self._config.pattern!r} finds: "
                f"{answer[-200:]!r}. Change template or pattern, or set on_bad_answer to skip"
            )
        return None


def _agreed(straight: Side | None, swapped: Side | None) -> Verdict:
    """One verdict of two, the second of which saw the answers in the other order."""
    if straight is None or swapped is None:
        return "unread"
    return straight if straight != swapped else "order"
