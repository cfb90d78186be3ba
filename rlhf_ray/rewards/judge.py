"""An AI judge behind an OpenAI-compatible chat endpoint."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config.rewards import ChatEndpointConfig, JudgeSourceConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.http import Endpoint
from rlhf_ray.rewards.source import column_of, messages_of
from rlhf_ray.types import Prompt, Rollout


class Chat:
    """Asks a model many questions at a time."""

    def __init__(self, name: str, config: ChatEndpointConfig) -> None:
        """Args: who asks, for messages; the endpoint and its model."""
        self._name = name
        self._config = config
        self._endpoint = Endpoint(name, f"{config.url.rstrip('/')}/chat/completions", config)

    async def answers(self, questions: Sequence[str]) -> list[str]:
        """The model's answer to each question, empty where it gave none.

        Raises:
            RlhfError: the endpoint refused, stayed down, or speaks another protocol.
        """
        bodies = [self._body(question) for question in questions]
        return [self._content(answer) for answer in await self._endpoint.post_all(bodies)]

    def _body(self, question: str) -> dict[str, Any]:
        config = self._config
        system = [{"role": "system", "content": config.system}] if config.system else []
        limits = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        return {
            **config.request,
            "model": config.model,
            "messages": [*system, {"role": "user", "content": question}],
            **{name: value for name, value in limits.items() if value is not None},
        }

    def _content(self, answer: Any) -> str:
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise RlhfError(
                f"{self._name}: {self._config.url} did not answer with a chat completion but "
                f"{str(answer)[:200]}; name the base URL of an OpenAI-compatible endpoint"
            ) from None


class JudgeSource:
    """Rates by the number that the judge names."""

    def __init__(self, config: JudgeSourceConfig) -> None:
        self._config = config
        self._chat = Chat(f"rewards: {config.name}", config)

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] the judge's numbers; None for an answer without one, where the config says so.

        Raises:
            RlhfError: the judge stayed down, or gave no number where that is an error.
            DataError: the template names a column that a row lacks.
        """
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

    def _number(self, answer: str) -> float | None:
        config = self._config
        found = last_match(config.pattern, answer)
        try:
            number = float(found) if found is not None else None
        except ValueError:
            number = None
        if number is not None and config.lowest <= number <= config.highest:
            return number
        if config.on_bad_answer == "error":
            raise RlhfError(
                f"rewards: {config.name} gave no number from {config.lowest:g} to "
                f"{config.highest:g} that pattern {config.pattern!r} finds: {answer[-200:]!r}. "
                "Change template or pattern, or set on_bad_answer to skip or score"
            )
        return config.bad_answer_score


def conversation(prompt: Prompt) -> str:
    """What the judge reads of a prompt: its text, or the turns of a chat."""
    messages = messages_of(prompt)
    if messages is None:
        return prompt.text
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def fill(template: str, values: Mapping[str, str], prompt: Prompt, source: str) -> str:
    """The template with each ``{name}`` replaced once, from ``values`` or the prompt's columns.

    Raises:
        DataError: a name that is neither.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        return values[name] if name in values else str(column_of(prompt, name, source))

    return re.sub(r"\{(\w+)\}", value, template)


def last_match(pattern: str, answer: str) -> str | None:
    """What the pattern's group holds in its last match: a judge reasons first, then decides."""
    matches = re.findall(pattern, answer)
    return matches[-1] if matches else None
