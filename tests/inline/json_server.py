"""A real HTTP server in a thread that answers JSON as a test says."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]
"""Status, what the body holds (text as it is, anything else as JSON), and further headers."""


@dataclass
class JsonServer:
    """A server, as its test sees it."""

    url: str
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    """(path, headers, body) of every request, in order of arrival."""
    most_at_once: int = 0
    """Most requests that were being answered at a time."""


@contextmanager
def serve(answer: Callable[[int, Any], Answer], delay_s: float = 0.0) -> Iterator[JsonServer]:
    """Serve until the end of the block.

    Args:
        answer: (number of the request from 0, its body) -> what to say.
        delay_s: before each answer.
    """
    lock = threading.Lock()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(known.requests)
                known.requests.append((self.path, dict(self.headers), body))
                under_way += 1
                known.most_at_once = max(known.most_at_once, under_way)
            time.sleep(delay_s)
            status, said, *headers = answer(number, body)
            content = (said if isinstance(said, str) else json.dumps(said)).encode()
            with lock:
                under_way -= 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    known = JsonServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat_completion(text: str | None) -> dict[str, Any]:
    """Return an answer of an OpenAI-compatible endpoint."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}
