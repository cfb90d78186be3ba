"""A call repeated in the background while other work runs; the waits of one that is tried again."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class GrowingWait:
    """The wait before each of several attempts in a row: twice the one before, up to the longest.

    Args:
        first_s: the first one.
        longest_s: the longest.
    """

    def __init__(self, first_s: float = 1.0, longest_s: float = 60.0) -> None:
        self._next_s = first_s
        self._longest_s = longest_s

    def next_s(self) -> float:
        """Return the seconds to wait now."""
        wait_s = min(self._next_s, self._longest_s)
        self._next_s = 2 * wait_s
        return wait_s


@contextmanager
def repeated(
    action: Callable[[], None], every_s: float, name: str, join_s: float | None = None
) -> Iterator[None]:
    """Call ``action`` every ``every_s`` seconds in a thread of that name until the block ends.

    Args:
        action: what to call.
        every_s: seconds between two calls.
        name: of the thread.
        join_s: longest wait at the end for a call that is running; None: until it returns.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            action()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(join_s)
