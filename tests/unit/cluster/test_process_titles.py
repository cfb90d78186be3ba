import asyncio

import pytest
import ray

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
