"""What users see of the actors' logs: warnings and errors, with the actor in front, each once.

All else that actors print is in Ray's log files, which its dashboard shows.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher

RAYS_OWN = "ray_print_logs"
"""The handler by which Ray prints whatever actors print; it removes it by this name at the end."""

_TELLS = re.compile(r"\b(WARNING|ERROR|CRITICAL|FATAL|Traceback)\b|\b\w*(Warning|Error|Exception):")
_VARIES = re.compile(r"0x[0-9a-f]+|\d+")
"""What tells apart two lines that say the same."""


class ActorLog:
    """Picks from the lines that Ray brings from the actors.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    def __call__(self, batch: Mapping[str, Any]) -> None:
        """Take ``lines`` of one process, and by Ray's other keys who that is."""
        if not batch["is_err"]:
            return
        who = batch.get("actor_name") or batch.get("task_name") or f"process {batch['pid']}"
        where = "" if batch["ip"] == batch["localhost"] else f" on {batch['ip']}"
        for block in _blocks(batch["lines"]):
            kind = _VARIES.sub("", "\n".join(block))
            if _TELLS.search(block[0]) and kind not in self._said:
                self._said.add(kind)
                for line in block:
                    self._say(f"{who}{where}: {line}")


def _blocks(lines: Iterable[str]) -> list[list[str]]:
    """Lines, each with those that are indented under it, as in a traceback."""
    blocks: list[list[str]] = []
    for line in lines:
        if blocks and line.startswith((" ", "\t")):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def show_warnings(say: Callable[[str], None]) -> None:
    """From now on print warnings and errors of actors, and nothing else of theirs."""
    global_worker_stdstream_dispatcher.remove_handler(RAYS_OWN)
    global_worker_stdstream_dispatcher.add_handler(RAYS_OWN, ActorLog(say))
