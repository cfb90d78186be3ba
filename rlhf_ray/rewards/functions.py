"""Python functions of the user's own, with the signatures of three systems."""

import inspect
import traceback
from collections.abc import Sequence
from typing import Any, SupportsFloat

from rlhf_ray.config.rewards import FunctionSourceConfig
from rlhf_ray.errors import DataError, RlhfError
from rlhf_ray.plugins import load_function
from rlhf_ray.rewards.source import Blocking, messages_of
from rlhf_ray.rewards.together import together
from rlhf_ray.types import Rollout

NOT_COLUMNS = {"messages", "prompt", "prompts", "completion", "completions", "completion_ids"}
"""Names that TRL's signature has for something else than a column."""


class FunctionSource:
    """Rates by calling a function: in a thread of its own, its awaitable in the event loop."""

    def __init__(self, config: FunctionSourceConfig) -> None:
        """
        Raises:
            ConfigError: there is no such function.
        """
        self._config = config
        self._function = load_function(config.function, "rewards")
        self._blocking = Blocking()

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] what the function says; None where it does not apply.

        Raises:
            RlhfError: the function raised, or returned something else than scores.
            DataError: it needs a column that the prompts lack.
        """
        signature = self._config.signature
        if signature == "verl":
            answers = await together(self._call(**verl_arguments(row)) for row in rollouts)
            result = [_verl_score(answer) for answer in answers]
        elif signature == "openrlhf":
            result = await self._call(*openrlhf_arguments(rollouts, self._config.label_column))
            result = result["rewards"] if isinstance(result, dict) else result
        else:
            result = await self._call(**self._trl_arguments(rollouts))
        return as_scores(result, len(rollouts), self._described)

    @property
    def _described(self) -> str:
        return f"rewards: {self._config.name}: {self._config.function}"

    async def _call(self, *args: Any, **named: Any) -> Any:
        try:
            result = await self._blocking(self._function, *args, **named)
            return await result if inspect.isawaitable(result) else result
        except Exception as error:  # whatever the user's code raises: it may not even pickle
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RlhfError(
                f"{self._described} raised {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno})"
            ) from None

    def _trl_arguments(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Those of TRL's arguments that the function takes."""
        given = trl_arguments(rollouts)
        signature = inspect.signature(self._function).parameters.values()
        taken = [parameter for parameter in signature if parameter.kind != parameter.VAR_POSITIONAL]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
            return given
        missing = [
            parameter.name
            for parameter in taken
            if parameter.default is parameter.empty and parameter.name not in given
        ]
        if missing:
            raise DataError(
                f"{self._described} takes {', '.join(missing)}, which the prompts lack; they have "
                f"{', '.join(given)}. Map the column in the data set's columns"
            )
        names = {parameter.name for parameter in taken}
        return {name: value for name, value in given.items() if name in names}


def trl_arguments(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """``prompts``, ``completions``, ``completion_ids``, and each column of the rows as a list.

    A chat's prompt is its messages, and its completion a list of one message; others are text.
    """
    fields = [rollout.prompt.fields for rollout in rollouts]
    names = dict.fromkeys(name for row in fields for name in row if name not in NOT_COLUMNS)
    return {
        "prompts": [messages_of(row.prompt) or row.prompt.text for row in rollouts],
        "completions": [_trl_completion(row) for row in rollouts],
        "completion_ids": [row.response_ids.tolist() for row in rollouts],
        **{name: [row.get(name) for row in fields] for name in names},
    }


def _trl_completion(rollout: Rollout) -> str | list[dict[str, str]]:
    if messages_of(rollout.prompt) is None:
        return rollout.text
    return [{"role": "assistant", "content": rollout.text}]


def verl_arguments(rollout: Rollout) -> dict[str, Any]:
    """verl's four arguments; the truth is ``reward_model.ground_truth`` of its data sets.

    Raises:
        DataError: the row has neither that nor a column ``ground_truth``.
    """
    fields = rollout.prompt.fields
    nested = fields.get("reward_model")
    truths = nested if isinstance(nested, dict) else fields
    if "ground_truth" not in truths:
        raise DataError(
            f"rewards: verl's signature needs a ground truth, and prompt {rollout.prompt.id} has "
            "neither a column ground_truth nor one reward_model with ground_truth in it"
        )
    return {
        "data_source": fields.get("data_source", ""),
        "solution_str": rollout.text,
        "ground_truth": truths["ground_truth"],
        "extra_info": fields.get("extra_info") or {},
    }


def openrlhf_arguments(
    rollouts: Sequence[Rollout], label_column: str
) -> tuple[list[str], list[str], list[Any]]:
    """Queries (prompt and response), prompts, labels ("" where a row has none)."""
    prompts = [rollout.prompt.text for rollout in rollouts]
    queries = [prompt + row.text for prompt, row in zip(prompts, rollouts, strict=True)]
    return queries, prompts, [row.prompt.fields.get(label_column, "") for row in rollouts]


def as_scores(values: Any, count: int, who: str) -> list[float | None]:
    """Numbers, however they come: a list or a tensor, bare or each in a list of its own.

    Raises:
        RlhfError: there are not ``count`` of them, or one is no number.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, (list, tuple)) or len(listed) != count:
        size = f"{len(listed)} scores" if isinstance(listed, (list, tuple)) else repr(listed)[:100]
        raise RlhfError(f"{who} gave {size} for {count} responses; give one score a response")
    return [_as_score(value, who) for value in listed]


def _as_score(value: Any, who: str) -> float | None:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, SupportsFloat):
        raise RlhfError(f"{who} gave {value!r} as a score; give a number or None")
    return None if value is None else float(value)


def _verl_score(answer: Any) -> Any:
    return answer.get("score") if isinstance(answer, dict) else answer
