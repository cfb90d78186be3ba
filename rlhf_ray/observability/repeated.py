"""Something that is done again and again beside other work."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(what: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Do it in a thread of that name every so many seconds, until the block has ended."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            what()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
