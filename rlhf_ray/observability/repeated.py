"""A call repeated in the background while other work runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
