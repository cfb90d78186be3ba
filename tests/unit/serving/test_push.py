"""An exported folder goes to a hub with the environment's token, or one message says why not."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from rlhf_ray.errors import ConfigError
from rlhf_ray.serving import push

SECRET = "hf_of_nobody"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export = tmp_path / "export"
    (export / "more").mkdir(parents=True)
    (export / "README.md").write_text("card")
    (export / "more" / "weights.bin").write_bytes(b"x" * 100)
    return export


@pytest.fixture
def refusing_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """A hub that refuses everybody; gives the tokens that it was shown."""
    shown: list[str | None] = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            shown.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps({"error": "You don't have the rights"}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield shown
    server.shutdown()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(push, "HfApi", lambda token: HfApi(endpoint=endpoint, token=token))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)


def test_what_would_be_uploaded_is_listed(folder: Path) -> None:
    assert push.files_of(folder) == {"README.md": 4, "more/weights.bin": 100}


def test_all_files_go_into_one_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, object]]] = []

    class Api:
        def __init__(self, token: str) -> None:
            assert token == SECRET

        def create_repo(self, name: str, **options: object) -> str:
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options: object) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(push, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert push.push(folder, "me/mine", private=True) == "https://hub/me/mine"
    (name, made), (_, uploaded) = calls
    assert (name, made) == ("me/mine", {"private": True, "exist_ok": True})
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/mine", folder)


def test_without_a_token_nothing_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        push.push(folder, "me/mine", private=True)


def test_a_refusal_is_one_message_without_the_token(
    folder: Path, refusing_hub: list[str | None]
) -> None:
    with pytest.raises(ConfigError, match="did not take me/mine") as refused:
        push.push(folder, "me/mine", private=True)
    assert refusing_hub == [f"Bearer {SECRET}"]
    assert SECRET not in str(refused.value)
    assert "403" in str(refused.value)


@pytest.mark.parametrize("name", ["me/mine", "a name/with/too many"])
def test_no_answer_and_a_wrong_name_are_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="did not take"):
        push.push(folder, name, private=False)
