"""Serve local pages: loopback alone, a token in the address, and one message for each error.

The token keeps other users of the machine out, and the check of the host name keeps out pages of
other sites that a browser was led to resolve to this machine.
"""

import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount

from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.web.text import excerpt, figure, markdown, visible

HOST = "127.0.0.1"
_NONCE_BYTES, _TOKEN_BYTES = 12, 16
_END_S = 5.0
"""Longest wait for answers in hand when pages are no longer served."""
_pages = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_pages.filters |= {"visible": visible, "excerpt": excerpt, "figure": figure, "markdown": markdown}


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Render a template of this room; ``root`` in it is the address of the first page."""
    text = _pages.get_template(template).render(
        root=request.scope["root_path"], nonce=request.state.nonce, **values
    )
    return HTMLResponse(text, status)


def application(routes: Sequence[BaseRoute], token: str) -> Starlette:
    """Return the application whose routes lie below the token.

    What a page raises as one of the project's errors, or because a file is gone, is shown as one
    message.
    """

    async def refuse(request: Request, error: Exception) -> Response:
        status = 400 if isinstance(error, ConfigError) else 410
        return page(request, "message.html.j2", status, message=str(error))

    app = Starlette(
        routes=[Mount(f"/{token}", routes=[*routes])],
        exception_handlers={RlhfError: refuse, OSError: refuse},
    )
    app.add_middleware(BaseHTTPMiddleware, dispatch=_guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    return app


async def _guard(request: Request, answer: RequestResponseEndpoint) -> Response:
    """Allow a page its own styles and script alone; nobody keeps or embeds it."""
    nonce = request.state.nonce = secrets.token_urlsafe(_NONCE_BYTES)
    response = await answer(request)
    response.headers.update(
        {
            "Content-Security-Policy": (
                f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
                "connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; "
                "frame-ancestors 'none'"
            ),
            "Referrer-Policy": "no-referrer",  # the address holds the token
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
    )
    return response


def listen(port: int) -> socket.socket:
    """Return a socket on loopback; port 0: a free one.

    Raises:
        ConfigError: the port is taken, or may not be used.
    """
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HOST, port))
        taken.listen()
    except OSError as error:
        taken.close()
        raise ConfigError(
            f"Port {port} of {HOST} cannot be used ({error.strerror}): another server may have it. "
            "Give another --port, or leave it out for a free one"
        ) from error
    return taken


def serve(routes: Sequence[BaseRoute], port: int, say: Callable[[str], object]) -> None:
    """Serve pages until Ctrl-C; ``say`` gets the address.

    Raises:
        ConfigError: the port is taken.
    """
    with listen(port) as taken:
        server, address = _server(routes, taken)
        port = taken.getsockname()[1]
        say(address)
        say(f"From another machine: ssh -L {port}:{HOST}:{port} THIS_HOST. Ctrl-C ends it.")
        server.run(sockets=[taken])


@contextmanager
def served(routes: Sequence[BaseRoute]) -> Iterator[str]:
    """Serve pages beside other work, on a free port; yields the address."""
    with listen(0) as taken:
        server, address = _server(routes, taken)
        thread = threading.Thread(target=server.run, args=([taken],), name="pages", daemon=True)
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(_END_S)


def _server(routes: Sequence[BaseRoute], taken: socket.socket) -> tuple[uvicorn.Server, str]:
    """Return a server of pages on a socket, not started, and the address of the first page."""
    token, port = secrets.token_urlsafe(_TOKEN_BYTES), taken.getsockname()[1]
    config = uvicorn.Config(
        application(routes, token), log_level="warning", access_log=False, lifespan="off"
    )
    return uvicorn.Server(config), f"http://{HOST}:{port}/{token}/"
