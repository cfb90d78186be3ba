"""A wait lasts while there is progress, and ends with what was last reported."""

import asyncio
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster import life_signs
from rlhf_ray.cluster.life_signs import IMPORTING, STARTING, LifeSign, LifeSigns, Watch, last_sign
from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.errors import ActorFailure
from rlhf_ray.observability import phases
from rlhf_ray.observability.phases import LIMIT, count, report

LIMIT_S = 0.1
STILL = LifeSign("starting: loading the model", 12.0, 800.0)
Read = Callable[[str], LifeSign | None]


class Actor:
    """An actor that takes ``seconds`` for a start or a call; its id is its name."""

    def __init__(self, name: str, seconds: float) -> None:
        self._actor_id = SimpleNamespace(hex=lambda: name)
        self.start = self.work = SimpleNamespace(remote=lambda: asyncio.sleep(seconds, "ready"))


class Role:
    def start(self) -> str: ...  # type: ignore[empty-body]
    def work(self) -> str: ...  # type: ignore[empty-body]


def worker_of(name: str, seconds: float, watch: Watch) -> RayWorker[Role]:
    actor: Any = Actor(name, seconds)
    return RayWorker[Role](
        *(name, actor, LIMIT_S, lambda *_: None),
        start_timeout_s=LIMIT_S,
        num_gpus=0.0,
        one_at_a_time=True,
        watch=watch,
    )


def started(name: str, seconds: float, watch: Watch) -> Any:
    return worker_of(name, seconds, watch).call(Role.start)


def called(name: str, seconds: float, watch: Watch) -> Any:
    return worker_of(name, seconds, watch).call(Role.work)


def moving(make: Callable[[int], LifeSign]) -> Read:
    count = itertools.count()
    return lambda _: make(next(count))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: LifeSign(f"shard {n} of 90", 0.0, 0.0),
        lambda n: LifeSign("compiling", n * LIMIT_S, 0.0),
        lambda n: LifeSign("loading", 0.0, n * 100.0),
        lambda n: LifeSign("loading", 0.0, 800.0, n * 100.0),
    ],
    ids=["phases", "work", "weights", "files"],
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
    assert re.fullmatch(
        r"generator-0 did not answer start, awaited by the driver since \d\d:\d\d:\d\d, "
        r"within 0 s, the last 0\.1 s \(cluster\.start_timeout_s\) without any progress\. It last "
        r"reported: starting: loading the model \(12 s of CPU time, 800 MB of memory, 0 MB read\)",
        str(caught.value),
    )


async def test_a_call_is_waited_for_while_units_of_work_are_done() -> None:
    units = Watch(moving(lambda n: LifeSign(f"generating: {n} tokens sampled")))
    assert await called("generator-0", 5 * LIMIT_S, units) == "ready"


async def test_an_engine_that_samples_nothing_ends_its_call_though_others_sample() -> None:
    reads = moving(lambda n: LifeSign(f"generating: {n} tokens sampled"))
    silent = LifeSign("generating: 12 tokens sampled")
    watch = Watch(lambda name: silent if name == "generator-1" else reads(name))
    other = asyncio.ensure_future(called("generator-0", 4 * LIMIT_S, watch))
    with pytest.raises(ActorFailure) as caught:
        await called("generator-1", 60, watch)
    assert re.search(
        r"generator-1 did not answer work, .* \(cluster\.call_timeout_s\) without any progress\. "
        r"It last reported: generating: 12 tokens sampled$",
        str(caught.value),
    )
    assert await other == "ready"


async def test_a_rank_that_waits_in_a_collective_is_waited_for_while_another_learns() -> None:
    slow = moving(lambda n: LifeSign(f"learning: {n} micro-batches learnt"))
    watch = Watch(lambda name: slow(name) if name == "critic-1" else LifeSign("learning"))
    calls = [called(f"critic-{rank}", 4 * LIMIT_S, watch) for rank in range(2)]
    assert await asyncio.gather(*calls) == ["ready", "ready"]


async def test_a_queued_call_is_not_late_while_its_actor_works_on_another() -> None:
    seconds = iter([0.8 * LIMIT_S, 1.6 * LIMIT_S, 2.4 * LIMIT_S])  # one after the other
    actor: Any = SimpleNamespace(
        work=SimpleNamespace(remote=lambda: asyncio.sleep(next(seconds), "ready")),
        _actor_id=SimpleNamespace(hex=lambda: "a1"),
    )
    worker = RayWorker[Role](
        *("policy-0", actor, LIMIT_S, lambda *_: None),
        start_timeout_s=60,
        num_gpus=0.0,
        one_at_a_time=True,
        watch=Watch(lambda _: STILL),
    )
    calls = [worker.call(Role.work) for _ in range(3)]
    assert await asyncio.gather(*calls) == ["ready"] * 3


async def test_a_store_that_does_not_answer_ends_no_call_that_is_answered() -> None:
    def fails(_: str) -> None:
        raise RuntimeError("the store is gone")

    assert await called("policy-0", 0.5 * LIMIT_S, Watch(fails)) == "ready"


async def test_an_idle_process_makes_no_progress_by_its_housekeeping() -> None:
    idle = moving(
        lambda n: LifeSign("starting", 12 + n * 0.01 * LIMIT_S, 800 + n % 3, n * 1e-3 * LIMIT_S)
    )
    with pytest.raises(ActorFailure, match="without any progress"):
        await started("generator-0", 60, Watch(idle))


async def dropped_calls(watch: Watch) -> None:
    """Calls to a generator that another one answers in half of the time, and pauses between."""
    worker = worker_of("generator-0", 60, watch)
    worker._one_at_a_time = False
    for _ in range(12):
        calls = [asyncio.ensure_future(worker.call(Role.work)) for _ in range(2)]
        done, dropped = await asyncio.wait(calls, timeout=LIMIT_S / 2)
        for call in dropped:
            call.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)
        for call in done:
            await call
        await asyncio.sleep(2 * LIMIT_S)


async def test_one_that_hangs_is_late_though_each_of_its_calls_is_dropped() -> None:
    began = time.monotonic()
    with pytest.raises(ActorFailure, match=r"did not answer work, .* without any progress"):
        await dropped_calls(Watch(lambda _: STILL))
    assert time.monotonic() - began > 4 * LIMIT_S, "time in which nobody waits for it is its own"


async def test_one_that_is_slow_is_not_late_though_each_of_its_calls_is_dropped() -> None:
    await dropped_calls(Watch(moving(lambda n: LifeSign(f"{n} tokens sampled"))))


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
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[bytes, bytes]]:
    """Stands for Ray's key-value store."""
    store: dict[bytes, bytes] = {}
    kv = SimpleNamespace(_internal_kv_put=store.__setitem__, _internal_kv_get=store.get)
    monkeypatch.setattr(life_signs, "internal_kv", kv)
    monkeypatch.setattr(life_signs, "INTERVAL_S", 0.01)
    # Other tests of this process may have left a phase and counts.
    report("")
    monkeypatch.setattr(phases, "_done", {})
    monkeypatch.setattr(phases, "_read", {})
    ended = threading.Event()

    def sleep(seconds: float) -> None:
        if ended.wait(seconds):
            threading.Event().wait()  # the thread sends nothing any more

    monkeypatch.setattr(life_signs, "time", SimpleNamespace(sleep=sleep))
    yield store
    ended.set()
    time.sleep(0.1)  # a sign that is under way is sent to this store, not to the next test's


def sign_when(holds: Callable[[LifeSign], bool]) -> LifeSign:
    deadline = time.monotonic() + 30
    while (sign := last_sign("a1")) is None or not holds(sign):  # busy meanwhile
        assert time.monotonic() < deadline, sign
    return sign


def test_a_process_that_starts_reports_its_phase_and_its_work(store: dict[bytes, bytes]) -> None:
    assert last_sign("a1") is None
    signs = LifeSigns("a1")
    first = sign_when(lambda sign: True)
    assert first.phase == IMPORTING
    signs.doing = STARTING
    report("loading the model")
    second = sign_when(lambda sign: sign.cpu_s - first.cpu_s > 0.1)
    report("")
    assert second.phase == "starting: loading the model"
    assert second.memory_mb > 10
    assert second.read_mb > 10


def test_a_rank_that_spins_while_it_waits_for_others_in_its_start_reports_no_work(
    store: dict[bytes, bytes],
) -> None:
    signs = LifeSigns("a1")
    signs.doing = STARTING
    report("waiting until the other ranks have loaded it", waits=True)
    said = "starting: waiting until the other ranks have loaded it"
    try:
        waiting = sign_when(lambda sign: sign.phase == said)
        assert waiting == LifeSign(said)
        store.clear()
        end = time.monotonic() + 0.3
        while time.monotonic() < end:  # as NCCL does
            pass
        assert not store
        report("making the optimizer")
        assert sign_when(lambda sign: sign.phase.endswith("optimizer")).cpu_s > 0
    finally:
        report("")


def test_a_process_at_work_reports_units_and_only_what_is_new(store: dict[bytes, bytes]) -> None:
    signs = LifeSigns("a1")
    signs.doing = "learning"
    count(1, "mini-batches learnt")
    count(1500, "rows computed")
    said = "learning: 1 mini-batches learnt, 1,500 rows computed"
    assert sign_when(lambda sign: sign.phase == said) == LifeSign(said)
    store.clear()
    time.sleep(0.1)
    assert not store
    count(500, "rows computed")
    assert "2,000 rows" in sign_when(lambda sign: True).phase


def test_a_count_costs_little() -> None:
    began = time.perf_counter()
    for _ in range(10_000):
        count(1, "tokens sampled")
    assert (time.perf_counter() - began) / 10_000 < 20e-6


def test_a_store_that_fails_does_not_keep_a_process_from_working(
    store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life_signs, "asdict", lambda _: 1 / 0)
    LifeSigns("a1")
    assert not store
