"""User functions as reward sources, with the signatures of TRL, verl or OpenRLHF."""

import inspect
import traceback
from collections.abc import Sequence
from typing import SupportsFloat

from rlhf_ray.config.rewards import FunctionSourceConfig
from rlhf_ray.errors import DataError, RlhfError
from rlhf_ray.plugins import load_function
from rlhf_ray.rewards.source import Blocking, messages_of, together
from rlhf_ray.types import Rollout

NOT_COLUMNS = {"messages", "prompt", "prompts", "completion", "completions", "completion_ids"}
"""Names that TRL's signature uses for arguments other than columns."""


class FunctionSource:
    """Scores by calling a function in a thread of its own; it may be async."""

    def __init__(self, config: FunctionSourceConfig) -> None:
        self._config = config
        self._function = load_function(config.function, "rewards")
        self._blocking = Blocking()

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] scores of the function; None where it does not apply."""
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

    async def _call(self, *args: object, **named: object) -> object:
        try:
            result = await self._blocking(self._function, *args, **named)
            return await result if inspect.isawaitable(result) else result
        # The user's own exception may not pickle, and so would never reach the driver.
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RlhfError(
                f"{self._described} raised {type(error).__name__}: {error} "
                f"({frame.filename}, line {frame.lineno})"
            ) from None

    def _trl_arguments(self, rollouts: Sequence[Rollout]) -> dict[str, object]:
        """Select TRL's arguments that the function takes."""
        arguments = trl_arguments(rollouts)
        signature = inspect.signature(self._function).parameters.values()
        accepted = [param for param in signature if param.kind != param.VAR_POSITIONAL]
        if any(param.kind is param.VAR_KEYWORD for param in accepted):
            return arguments
        missing = [
            param.name
            for param in accepted
            if param.default is param.empty and param.name not in arguments
        ]
        if missing:
            raise DataError(
                f"{self._described} takes {', '.join(missing)}, which the prompts lack; they have "
                f"{', '.join(arguments)}. Map the column in the data set's columns"
            )
        names = {param.name for param in accepted}
        return {name: value for name, value in arguments.items() if name in names}


def trl_arguments(rollouts: Sequence[Rollout]) -> dict[str, object]:
    """Return TRL's arguments: prompts, completions, completion_ids, and each column as a list.

    The prompt of a chat is its messages, and its completion a list of one message; otherwise both
    are text.
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


def verl_arguments(rollout: Rollout) -> dict[str, object]:
    """Return verl's four arguments; its datasets hold ``reward_model.ground_truth``.

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
) -> tuple[list[str], list[str], list[object]]:
    """Return queries (prompt and response), prompts, and labels ("" if a row has none)."""
    prompts = [rollout.prompt.text for rollout in rollouts]
    queries = [prompt + row.text for prompt, row in zip(prompts, rollouts, strict=True)]
    return queries, prompts, [row.prompt.fields.get(label_column, "") for row in rollouts]


def as_scores(values: object, count: int, who: str) -> list[float | None]:
    """Convert scores from a list or a tensor, each score bare or in a list of its own.

    Raises:
        RlhfError: there are not ``count`` of them, or one is no number.
    """
    to_list = getattr(values, "tolist", None)
    listed = to_list() if callable(to_list) else values
    if not isinstance(listed, (list, tuple)) or len(listed) != count:
        size = f"{len(listed)} scores" if isinstance(listed, (list, tuple)) else repr(listed)[:100]
        raise RlhfError(f"{who} gave {size} for {count} responses; give one score a response")
    return [_as_score(value, who) for value in listed]


def _as_score(value: object, who: str) -> float | None:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, SupportsFloat):
        raise RlhfError(f"{who} gave {value!r} as a score; give a number or None")
    return None if value is None else float(value)


def _verl_score(answer: object) -> object:
    return answer.get("score") if isinstance(answer, dict) else answer
