"""Commands that must be refused, and a run that went through every stage."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import vowels
from command_line import CONFIG, PLANTED, Refused, command
from tiny_models import build_tiny

from rlhf_ray.config import load
from rlhf_ray.stages import pipeline


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command changes its arguments and quietens the libraries for its process: undo that."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    before = dict(os.environ)
    levels = {name: logging.getLogger(name).level for name in ("ray", "datasets", "httpx")}
    yield
    os.environ.clear()
    os.environ.update(before)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama whose output layer can tell tokens apart."""
    return build_tiny(tmp_path_factory.mktemp("models") / "base", vowels.TEXTS, sharp=True)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns its one message."""

    def run(*arguments: object, says: str) -> str:
        assert command(*arguments) == 2
        printed = capsys.readouterr().err
        # Libraries that were loaded before the command could quieten them may speak first.
        _, *messages = re.split(r"^Error: ", printed, flags=re.MULTILINE)
        assert len(messages) == 1, printed
        assert "Traceback" not in printed
        assert re.search(says, messages[0]), messages[0]
        return messages[0]

    return run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that went through every stage; no test may change it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "RAY_AUTH_TOKEN"):
            environment.setenv(name, PLANTED)
        pipeline.run(load(folder / "config.yaml", [f"run.dir={folder / 'run'}"]))
    return folder / "run"
