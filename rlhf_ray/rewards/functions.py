"""User functions as reward sources, with the signatures of TRL, verl or OpenRLHF."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial

from rlhf_ray.config.rewards import FunctionSourceConfig
from rlhf_ray.errors import DataError
from rlhf_ray.observability.phases import count
from rlhf_ray.rewards.function_process import FunctionProcess, LateError
from rlhf_ray.rewards.source import Blocking, messages_of, together
from rlhf_ray.rewards.user_function import UserFunction
from rlhf_ray.types import Rollout

NOT_COLUMNS = {"messages", "prompt", "prompts", "completion", "completions", "completion_ids"}
"""Names that TRL's signature uses for arguments other than columns."""


class FunctionSource:
    """Scores by calling a function, in a process of its own unless ``in_process`` is set."""

    def __init__(self, config: FunctionSourceConfig, limit_s: float | None = None) -> None:
        """
        Args:
            config: the function.
            limit_s: longest time without a finished call; what is missing then stays missing.
        """
        self._config = config
        self._limit_s = None if config.in_process else limit_s
        which = (config.name, config.function, config.signature)
        self._call = (
            partial(_call_here, UserFunction(*which), Blocking())
            if config.in_process
            else FunctionProcess(*which, config.timeout_s).scores
        )
        self._moved_at = 0.0
        """When a call finished last, by the clock of the event loop."""

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] scores of the function; None where it does not apply, or is late."""
        began_at = asyncio.get_running_loop().time()
        if self._config.signature == "verl":
            rows = await together(self._scores([row], began_at) for row in rollouts)
            return [score for row in rows for score in row]
        return await self._scores(rollouts, began_at)

    async def _scores(self, rollouts: Sequence[Rollout], began_at: float) -> list[float | None]:
        """Call the function; where it is late, call it for each response alone.

        Args:
            rollouts: responses.
            began_at: when their shard came, by the clock of the event loop.
        """
        config = self._config
        try:
            return await self._finished(rollouts, began_at)
        except TimeoutError:
            logging.warning(
                f"rewards: {config.name}: {config.function} took more than {self._limit_s:g} s for "
                f"a shard, in which no call finished; {len(rollouts)} scores are missing. Raise "
                "cluster.call_timeout_s, or lower the source's timeout_s or rollout.shard_size"
            )
            return [None] * len(rollouts)
        except LateError:
            prompts = ", ".join(dict.fromkeys(row.prompt.id for row in rollouts))
            alone = len(rollouts) == 1
            logging.warning(
                f"rewards: {config.name}: {config.function} did not return within "
                f"{config.timeout_s:g} s (timeout_s) for responses to the prompts {prompts}; its "
                f"process is started again, and "
                + ("the score is missing" if alone else "each response is scored alone")
            )
            if alone:
                return [None]
            return [score for row in rollouts for score in await self._scores([row], began_at)]

    async def _finished(self, rollouts: Sequence[Rollout], began_at: float) -> list[float | None]:
        """Call the function once.

        Raises:
            TimeoutError: no call of it, this one or another, has finished for too long.
        """
        clock = asyncio.get_running_loop().time
        calling = asyncio.ensure_future(self._call(*self._arguments(rollouts), len(rollouts)))
        try:
            while not calling.done():
                left_s = None
                if self._limit_s is not None:
                    left_s = max(began_at, self._moved_at) + self._limit_s - clock()
                    if left_s <= 0:
                        raise TimeoutError
                await asyncio.wait([calling], timeout=left_s)
            scores = calling.result()
        finally:
            calling.cancel()
        self._moved_at = clock()
        count(len(rollouts), "responses scored by functions")
        return scores

    def _arguments(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[Sequence[object], Mapping[str, object]]:
        """Return what a call takes by position and by name."""
        match self._config.signature:
            case "trl":
                return (), trl_arguments(rollouts)
            case "verl":
                return (), verl_arguments(rollouts[0])
            case "openrlhf":
                return openrlhf_arguments(rollouts, self._config.label_column), {}


async def _call_here(
    function: UserFunction,
    blocking: Blocking,
    args: Sequence[object],
    named: Mapping[str, object],
    num_responses: int,
) -> list[float | None]:
    result = await blocking(function.call, args, named)
    return function.scores(await function.awaited(result), num_responses)


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
    truths = ground_truths(fields)
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


def ground_truths(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Return what may hold ``ground_truth``: the column ``reward_model``, else the row."""
    nested = fields.get("reward_model")
    return nested if isinstance(nested, dict) else fields


def openrlhf_arguments(
    rollouts: Sequence[Rollout], label_column: str
) -> tuple[list[str], list[str], list[object]]:
    """Return queries (prompt and response), prompts, and labels ("" if a row has none)."""
    prompts = [rollout.prompt.text for rollout in rollouts]
    queries = [prompt + row.text for prompt, row in zip(prompts, rollouts, strict=True)]
    return queries, prompts, [row.prompt.fields.get(label_column, "") for row in rollouts]
