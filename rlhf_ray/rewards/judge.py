"""An AI judge behind an OpenAI-compatible chat endpoint: it rates a response or compares two."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.rewards import ChatEndpointConfig, JudgeSourceConfig, PairJudgeConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.remote import Endpoint, Refused, UnusableError, beginning
from rlhf_ray.rewards.source import column_of, messages_of
from rlhf_ray.types import Prompt, Rollout

Side = Literal["a", "b"]
Verdict = Literal["a", "b", "order", "unread"]
"""The better answer; order: the verdict follows the position; unread: no A or B was found."""

_PLACE = re.compile(r"\{(\w+)\}")
_RATING, _PAIR = ("prompt", "response", "lowest", "highest"), ("prompt", "a", "b")
"""Places of a template that are no columns: of a judge that rates, and of one that compares."""


class Chat:
    """A chat endpoint that is asked many questions at once."""

    def __init__(self, name: str, config: ChatEndpointConfig) -> None:
        """Args: who asks, for messages; the endpoint and its model."""
        self._name = name
        self._config = config
        url = f"{config.url.rstrip('/')}/chat/completions"
        self._endpoint = Endpoint(name, url, config, _check_choices)

    async def answers(self, questions: Sequence[str]) -> list[str | Refused]:
        """Return the model's answer to each question, empty if it gave none."""
        bodies = [self._body(question) for question in questions]
        answers = await self._endpoint.post_all(bodies)
        self._endpoint.require_an_answer(answers)
        return [self._content(answer) for answer in answers]

    def _body(self, question: str) -> dict[str, object]:
        config = self._config
        system = [{"role": "system", "content": config.system}] if config.system else []
        limits = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        return {
            **config.request,
            "model": config.model,
            "messages": [*system, {"role": "user", "content": question}],
            **{name: value for name, value in limits.items() if value is not None},
        }

    def _content(self, answer: object | Refused) -> str | Refused:
        match answer:
            case Refused():
                return answer
            case {"choices": [{"message": {"content": list() as parts}}, *_]}:
                texts = (part.get("text") for part in parts if isinstance(part, dict))
                return "".join(text for text in texts if isinstance(text, str))
            case {"choices": [{"message": {"content": str() | None as content}}, *_]}:
                return content or ""
            case {"choices": [{"message": {"role": _}}, *_]}:
                return ""
        raise RlhfError(
            f"{self._name}: {self._config.url} did not answer with a chat completion but "
            f"{beginning(answer)}; name the base URL of an OpenAI-compatible endpoint"
        )


def _check_choices(answer: object) -> None:
    match answer:
        case {"choices": [] | None} | {"choices": [{"message": None} | {"error": _}, *_]}:
            raise UnusableError(f"no choices in {beginning(answer)}")


class JudgeSource:
    """Scores by the number that the judge names."""

    def __init__(self, config: JudgeSourceConfig) -> None:
        self._config = config
        self._chat = Chat(f"rewards: {config.name}", config)

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] numbers; None for an answer without one if ``on_bad_answer`` is skip."""
        answers = await self._chat.answers([self._question(rollout) for rollout in rollouts])
        return [self._number(answer) for answer in answers]

    def _question(self, rollout: Rollout) -> str:
        config = self._config
        values = {
            "prompt": conversation(rollout.prompt),
            "response": rollout.text,
            "lowest": f"{config.lowest:g}",
            "highest": f"{config.highest:g}",
        }
        return fill(config.template, values, rollout.prompt, config.name)

    def _number(self, answer: str | Refused) -> float | None:
        config = self._config
        found = None if isinstance(answer, Refused) else last_match(config.pattern, answer)
        try:
            number = float(found) if found is not None else None
        except ValueError:
            number = None
        if number is not None and config.lowest <= number <= config.highest:
            return number
        if config.on_bad_answer == "error":
            raise RlhfError(
                f"rewards: {config.name} {answer.message}. Set on_bad_answer to skip or score"
                if isinstance(answer, Refused)
                else f"rewards: {config.name} gave no number from {config.lowest:g} to "
                f"{config.highest:g} that pattern {config.pattern!r} finds: {answer[-200:]!r}. "
                "Change template or pattern, or set on_bad_answer to skip or score"
            )
        return config.bad_answer_score


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
    """Says which of two answers is better."""

    def __init__(self, name: str, config: PairJudgeConfig) -> None:
        """Args: who asks, for messages; the judge."""
        self._name = name
        self._config = config
        self._chat = Chat(name, config)

    async def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return a verdict for each pair, in order.

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

    def _read(self, answer: str | Refused) -> Side | None:
        found = None if isinstance(answer, Refused) else last_match(self._config.pattern, answer)
        letter = (found or "").lower()
        if letter == "a":
            return "a"
        if letter == "b":
            return "b"
        if self._config.on_bad_answer == "error":
            raise RlhfError(
                f"{self._name} {answer.message}. Set on_bad_answer to skip"
                if isinstance(answer, Refused)
                else f"{self._name} gave no A or B that pattern {self._config.pattern!r} finds: "
                f"{answer[-200:]!r}. Change template or pattern, or set on_bad_answer to skip"
            )
        return None


def _agreed(straight: Side | None, swapped: Side | None) -> Verdict:
    """Combine two verdicts; the second was given with the answers in the other order."""
    if straight is None or swapped is None:
        return "unread"
    return straight if straight != swapped else "order"


def conversation(prompt: Prompt) -> str:
    """Return a prompt for the judge: its text, or the messages of a chat."""
    messages = messages_of(prompt)
    if messages is None:
        return prompt.text
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def fill(template: str, values: Mapping[str, str], prompt: Prompt, source: str) -> str:
    """Replace each ``{name}`` of a template from ``values`` or the prompt's columns.

    One pass: braces in a response must not be filled in again, as str.format would not allow them.

    Raises:
        DataError: a name is in neither.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        return values[name] if name in values else str(column_of(prompt, name, source))

    return _PLACE.sub(value, template)


def columns_in(judge: JudgeSourceConfig | PairJudgeConfig) -> list[str]:
    """Return the columns of the data that a judge's template names."""
    filled = _PAIR if isinstance(judge, PairJudgeConfig) else _RATING
    return [name for name in dict.fromkeys(_PLACE.findall(judge.template)) if name not in filled]


def last_match(pattern: str, answer: str) -> str | None:
    """Return the pattern's group in its last match: a judge reasons first, then decides."""
    matches = re.findall(pattern, answer)
    return matches[-1] if matches else None
