"""A user's reward function: its arguments, its scores, and errors that name the user's line."""

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Literal, SupportsFloat

from rlhf_ray.errors import DataError, RlhfError
from rlhf_ray.plugins import load_function, users_line

Signature = Literal["trl", "verl", "openrlhf"]


class UserFunction:
    """A function of one of the known signatures; it may be async."""

    def __init__(self, name: str, spec: str, signature: Signature) -> None:
        """
        Args:
            name: the source's, for messages.
            spec: ``module:name`` or ``path/to/file.py:name``.
            signature: whose arguments it takes, and what it returns.

        Raises:
            ConfigError: the function cannot be loaded.
        """
        self._function = load_function(spec, f"rewards: {name}")
        self._described = f"rewards: {name}: {spec}"
        self._signature = signature

    def call(self, args: Sequence[object], named: Mapping[str, object]) -> object:
        """Return what the function returns; of TRL's arguments it gets those that it takes.

        In a thread without an event loop, as the function may run its own.

        Raises:
            RlhfError: the function raised or exited.
            DataError: it needs a column that the prompts lack.
        """
        if self._signature == "trl":
            named = self._taken(named)
        try:
            return self._function(*args, **named)
        except RlhfError:
            raise
        # No future takes a StopIteration, so the error is a message before it leaves this thread.
        except BaseException as error:
            raise self._failure(error) from None

    async def awaited(self, result: object) -> object:
        """Await what an async function returned; anything else is returned.

        Raises:
            RlhfError: the function raised or exited.
        """
        try:
            return await result if inspect.isawaitable(result) else result
        except (KeyboardInterrupt, asyncio.CancelledError, RlhfError):
            raise
        except BaseException as error:
            raise self._failure(error) from None

    def scores(self, result: object, count: int) -> list[float | None]:
        """Return the scores of ``count`` responses in a result; None where it has none.

        Raises:
            RlhfError: it does not hold scores.
        """
        if isinstance(result, dict):
            result = result.get("score" if self._signature == "verl" else "rewards", result)
        if self._signature == "verl":
            result = [result]
        return as_scores(result, count, self._described)

    def _failure(self, error: BaseException) -> RlhfError:
        """Return an error's message: it may not pickle itself, and an exit would end the run."""
        return RlhfError(
            f"{self._described} raised {type(error).__name__}: {error} "
            f"({users_line(error, self._function)})"
        )

    def _taken(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """Select TRL's arguments that the function takes."""
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
    try:
        if value is None or isinstance(value, SupportsFloat):
            return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):  # an array of several, a huge integer
        pass
    raise RlhfError(f"{who} gave {repr(value)[:100]} as a score; give a number or None")
