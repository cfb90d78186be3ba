"""Malformed inputs: each ends in one clear message and exit code 2, or is repaired and counted."""

import re
from pathlib import Path

import pytest
from command_line import CONFIG, PLANTED, Ends, command

CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
LONGEST_MESSAGE = 4000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A hang is a failure like any other, and must not take the ten minutes of other tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(60))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets that no message may show, and no network: a name of a hub would be waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "DB_PWD"):
        monkeypatch.setenv(name, PLANTED)


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str]) -> Ends:
    """Runs a command that must end with one of ``codes``; returns what it printed.

    Whatever the code: no traceback, no control character, no secret. With 2, one message that
    ``says`` what it should.
    """

    def run(*arguments: object, codes: tuple[int, ...] = (2,), says: str = "") -> str:
        capsys.readouterr()
        code = command(*arguments)
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert "Traceback" not in printed
        assert PLANTED not in printed
        assert not (found := CONTROL.search(printed)), f"{found!r} in {printed!r}"
        assert code in codes, f"exit code {code}:\n{printed}"
        if code == 2:
            _, *messages = re.split(r"^Error: ", captured.err, flags=re.MULTILINE)
            assert len(messages) == 1, printed
            assert 20 < len(messages[0]) < LONGEST_MESSAGE, messages[0]
            assert re.search(says, messages[0]), messages[0]
        return printed

    return run


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path
