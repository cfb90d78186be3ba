"""Local pages on a real server, for tests that need more than a client in the same process."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from starlette.routing import BaseRoute

from rlhf_ray.web.server import application, listen


@contextmanager
def served(routes: Sequence[BaseRoute]) -> Iterator[str]:
    """The address of the first page."""
    with listen(0) as taken:
        app = application(routes, "token")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/token/"
        server.should_exit = True
        thread.join(10)
