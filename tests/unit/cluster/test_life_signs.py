"""A start is waited for while it makes progress, and ends with what was last reported."""

import asyncio
import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster import life_signs
from rlhf_ray.cluster.life_signs import LIMIT, LifeSign, Watch, last_sign, signs_of_life
from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.errors import ActorFailure
from rlhf_ray.observability.phases import report

LIMIT_S = 0.1
STILL = LifeSign("starting: loading the model", 12.0, 800.0)
Read = Callable[[str], LifeSign | None]


class Starting:
    """An actor whose start takes ``seconds``."""

    _actor_id = SimpleNamespace(hex=lambda: "a1")

    def __init__(self, seconds: float) -> None:
        self.start = SimpleNamespace(remote=lambda: asyncio.sleep(seconds, "ready"))


class Role:
    def start(self) -> str: ...  # type: ignore[empty-body]


def started(name: str, seconds: float, watch: Watch) -> Any:
    actor: Any = Starting(seconds)
    worker = RayWorker[Role](
        *(name, actor, 600.0, lambda *_: None),
        start_timeout_s=LIMIT_S,
        num_gpus=0.0,
        one_at_a_time=True,
        watch=watch,
    )
    return worker.call(Role.start)


def moving(make: Callable[[int], LifeSign]) -> Read:
    count = itertools.count()
    return lambda _: make(next(count))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: LifeSign(f"shard {n} of 90", 0.0, 0.0),
        lambda n: LifeSign("compiling", n * LIMIT_S, 0.0),
        lambda n: LifeSign("loading", 0.0, n * 100.0),
    ],
    ids=["phases", "work", "weights"],
)
async def test_a_slow_start_that_makes_progress_is_waited_for(
    make: Callable[[int], LifeSign],
) -> None:
    assert await started("generator-0", 5 * LIMIT_S, Watch(moving(make))) == "ready"


async def test_a_start_that_stands_still_ends_with_what_was_last_reported() -> None:
    began = time.monotonic()
    with pytest.raises(ActorFailure) as caught:
        await started("generator-0", 60, Watch(lambda _: STILL))
    assert time.monotonic() - began < 5 * LIMIT_S
    assert str(caught.value) == (
        "generator-0 did not answer start within 0 s, the last 0.1 s (cluster.start_timeout_s) "
        "without any progress. It last reported: starting: loading the model (12 s of CPU time, "
        "800 MB of memory)"
    )


async def test_an_idle_process_makes_no_progress_by_its_housekeeping() -> None:
    idle = moving(lambda n: LifeSign("starting", 12 + n * 0.01 * LIMIT_S, 800 + n % 3))
    with pytest.raises(ActorFailure, match="without any progress"):
        await started("generator-0", 60, Watch(idle))


async def test_a_process_that_never_reported_is_said_to() -> None:
    with pytest.raises(ActorFailure, match="It has reported nothing"):
        await started("generator-0", 60, Watch(lambda _: None))


async def test_what_moves_forever_ends_at_the_absolute_limit() -> None:
    busy = Watch(moving(lambda n: LifeSign(f"round {n}", 0.0, 0.0)))
    began = time.monotonic()
    with pytest.raises(ActorFailure, match=r"within 1 s, 10 times as long .* reported: round \d"):
        await started("generator-0", 60, busy)
    assert LIMIT * LIMIT_S <= time.monotonic() - began < 3 * LIMIT * LIMIT_S


async def test_a_rank_that_waits_for_the_others_is_waited_for() -> None:
    slow = moving(lambda n: LifeSign(f"shard {n}", 0.0, 0.0))
    watch = Watch(lambda name: slow(name) if name == "policy-1" else STILL)
    starts = [started(f"policy-{rank}", 4 * LIMIT_S, watch) for rank in range(2)]
    assert await asyncio.gather(*starts) == ["ready", "ready"]


async def test_another_role_does_not_hide_a_start_that_stands_still() -> None:
    slow = moving(lambda n: LifeSign(f"shard {n}", 0.0, 0.0))
    watch = Watch(lambda name: slow(name) if name == "policy-0" else STILL)
    policy = asyncio.ensure_future(started("policy-0", 4 * LIMIT_S, watch))
    with pytest.raises(ActorFailure, match="critic-0 did not answer start"):
        await started("critic-0", 60, watch)
    assert await policy == "ready"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """Stands for Ray's key-value store."""
    store: dict[bytes, bytes] = {}
    kv = SimpleNamespace(
        _internal_kv_initialized=lambda: True,
        _internal_kv_put=store.__setitem__,
        _internal_kv_get=store.get,
    )
    monkeypatch.setattr(life_signs, "internal_kv", kv)
    monkeypatch.setattr(life_signs, "_key", str.encode)
    monkeypatch.setattr(life_signs, "INTERVAL_S", 0.01)
    report("")  # other tests of this process may have left a phase
    return store


def test_a_busy_process_reports_its_phase_and_its_work(store: dict[bytes, bytes]) -> None:
    assert last_sign("policy-0") is None
    with signs_of_life("policy-0", "starting"):
        first = last_sign("policy-0")
        report("loading the model")
        assert first is not None
        deadline = time.monotonic() + 30
        while (second := last_sign("policy-0")) and second.cpu_s - first.cpu_s < 0.1:
            assert time.monotonic() < deadline, second  # busy until a sign says so
    report("")
    assert second is not None
    assert first.phase == "starting"
    assert second.phase == "starting: loading the model"
    assert second.memory_mb > 10


def test_a_store_that_fails_does_not_keep_a_process_from_starting(
    store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life_signs, "_key", lambda _: 1 / 0)
    with signs_of_life("policy-0", "starting"):
        pass
    assert not store
