import asyncio
import json
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from rlhf_ray.cluster import orphans, process_titles
from rlhf_ray.cluster.process_titles import titled


class Learner:
    """A role whose methods are called one at a time."""

    def __init__(self, name: str, version: int | None = None) -> None:
        self._name = name
        self.version = version

    def __repr__(self) -> str:
        return self._name

    def adapter(self, version: int) -> int:
        self.version = version
        return version

    def learn(self) -> None:
        raise ValueError("boom")

    def helper(self) -> str:
        return self._secret()

    def _secret(self) -> str:
        return "secret"


class Sampler:
    """A role whose calls overlap."""

    def __init__(self, name: str) -> None:
        self.version = 7

    async def generate(self, gate: asyncio.Event) -> str:
        await gate.wait()
        return "sampled"

    async def publish(self) -> None:
        self.version = 8


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr(ray._raylet, "setproctitle", shown.append)
    return shown


def test_a_title_has_name_version_and_what_is_done(
    titles: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    actor = titled(Learner)("policy-0")
    assert actor.adapter(37) == 37
    with pytest.raises(ValueError, match="boom"):
        actor.learn()
    assert actor.helper() == "secret"
    assert titles == [
        "ray::policy-0 idle",
        "ray::policy-0 publishing",
        "ray::policy-0 v37 idle",
        "ray::policy-0 v37 learning",
        "ray::policy-0 v37 idle",
        "ray::policy-0 v37 helper",
        "ray::policy-0 v37 idle",
    ]
    # To this Ray goes back after each call, and with this it prefixes what follows in the log.
    assert type(actor).__name__ == "policy-0 v37 idle"
    assert capsys.readouterr().err.splitlines() == [
        title.replace("ray::", ":actor_name:") for title in titles
    ]


def test_what_overlaps_is_shown_until_its_last_call_ends(titles: list[str]) -> None:
    async def calls() -> None:
        gate = asyncio.Event()
        actor = titled(Sampler)("generator-0")
        generations = [asyncio.ensure_future(actor.generate(gate)) for _ in range(2)]
        await asyncio.sleep(0)
        await actor.publish()
        assert titles[-1] == "ray::generator-0 v8 generating"
        gate.set()
        assert await asyncio.gather(*generations) == ["sampled", "sampled"]

    asyncio.run(calls())
    assert titles[-1] == "ray::generator-0 v8 idle"
    assert "ray::generator-0 v7 loading" in titles


def test_to_ray_the_class_is_what_it_was() -> None:
    assert titled(Learner).__name__ == "Learner"
    assert titled(Learner).learn.__doc__ == Learner.learn.__doc__
    assert asyncio.iscoroutinefunction(titled(Sampler).generate)
    assert Learner.__name__ == "Learner"


class Starting:
    """A role that starts a process, and says how long it took until a record names it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._folder = folder

    def start(self) -> bool:
        with subprocess.Popen(["sleep", "60"]) as child:
            try:
                return any(self._is_recorded(child.pid) for _ in range(100))
            finally:
                child.kill()

    def _is_recorded(self, pid: int) -> bool:
        time.sleep(0.2)
        (record,) = self._folder.glob("*.json")
        return pid in {entry["pid"] for entry in json.loads(record.read_text())["processes"]}


def test_what_a_role_starts_is_recorded_while_it_still_starts(
    titles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the engine of a generator that is killed then would leave its shared memory."""
    context = SimpleNamespace(get_actor_id=lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(orphans, "records_folder", lambda: tmp_path)
    monkeypatch.setenv(process_titles.CLEANS_UP, "1")
    actor = titled(Starting)("generator-0", tmp_path)
    assert actor.start()
    assert "process-record" not in {thread.name for thread in threading.enumerate()}
