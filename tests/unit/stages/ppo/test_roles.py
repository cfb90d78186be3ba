"""Arguments with which scorers start, and the capacity that a run requests."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster import spawner as spawner_module
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.config import resolve
from rlhf_ray.errors import PlacementError
from rlhf_ray.observability.outages import Outages
from rlhf_ray.placement.groups import LiveNode, Placement
from rlhf_ray.placement.layout import Demand, Node
from rlhf_ray.stages.ppo import roles as ppo_roles
from rlhf_ray.stages.ppo.roles import spawn_scorers


class Spawner:
    """Remembers what it was asked to start."""

    def spawn_crew(self, role_class: type, role: str, count: int, *args: Any) -> None:
        self.count, self.args = count, args


def test_scorers_get_files_by_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer's process may run elsewhere in the file system."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    sources = [
        {"type": "function", "name": "file", "function": "mine.py:f"},
        {"type": "function", "name": "module", "function": "mine:f"},
        {"type": "model", "path": "model"},
        {"type": "classifier", "path": "hub/name"},
    ]
    spawner: Any = Spawner()
    spawn_scorers(spawner, resolve({"rewards": sources}), "reward", "policy")
    file, module, model, classifier = spawner.args[0]
    assert file.function == f"{tmp_path}/mine.py:f"
    assert module.function == "mine:f"
    assert model.path == str(tmp_path / "model")
    assert classifier.path == "hub/name"
    assert spawner.args[1].func is ppo_roles.reward_sources


ASKED = [Demand("policy", 2, 1), Demand("reward", 1, 0), Demand("generator", 1, 2)]
POLICY, REWARD, GENERATOR = {"CPU": 1.0, "GPU": 1}, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 2}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests to Ray's autoscaler in order; the demands are then reserved."""
    made: list[Any] = []

    async def reserve(placement: Placement, demands: Any) -> None:
        made.append("reserved")

    monkeypatch.setattr(spawner_module, "request_capacity", lambda bundles, _: made.append(bundles))
    monkeypatch.setattr(Placement, "labels", lambda *_: [])
    monkeypatch.setattr(Placement, "reserve", reserve)
    return made


async def test_capacity_is_requested_for_every_role_and_released_at_the_end(
    requests: list[Any],
) -> None:
    """The request comes before the wait, and counts GPUs that no node has yet."""
    spawner = RoleSpawner(resolve({"cluster": {"mode": "ray"}}), lambda *_: None)
    await spawner.place(ASKED)
    first = [POLICY, POLICY, REWARD, GENERATOR]
    assert requests == [first, "reserved"]
    spawner.request_generators(3)
    await spawner.stop_all()
    assert requests[2:] == [[*first, GENERATOR, GENERATOR], []]


async def test_a_run_that_cannot_be_placed_releases_its_request_for_capacity(
    requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> None:
        raise PlacementError("no room")

    monkeypatch.setattr(Placement, "reserve", refuse)
    config = resolve(
        {"cluster": {"mode": "ray"}, "ppo": {"advantage": "rloo", "samples_per_prompt": 2}}
    )
    recorder: Any = SimpleNamespace(span=lambda *_: None, outages=Outages())
    with pytest.raises(PlacementError):
        async with ppo_roles.ppo_roles(config, "model", None, None, recorder, print):
            pass
    assert requests[0]
    assert requests[-1] == []


async def test_the_request_for_capacity_is_repeated_while_waiting(
    requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels become known, and another run's request may have replaced ours."""
    labels: list[dict[str, str]] = []
    now = 0.0
    monkeypatch.setattr(spawner_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Placement, "labels", lambda *_: [*labels])
    monkeypatch.setattr(
        spawner_module, "request_capacity", lambda _, labels: requests.append(labels)
    )

    async def wait(placement: Placement, _: Any) -> None:
        nonlocal now
        placement._request_nodes()
        labels.append({"role": "train"})
        placement._request_nodes()
        placement._request_nodes()
        now = 31.0
        placement._request_nodes()

    monkeypatch.setattr(Placement, "reserve", wait)
    spawner = RoleSpawner(resolve({"cluster": {"mode": "ray"}}), lambda *_: None)
    await spawner.place(ASKED)
    assert requests == [[], [{"role": "train"}], [{"role": "train"}]]


async def test_a_local_cluster_gets_no_request_for_capacity(requests: list[Any]) -> None:
    spawner = RoleSpawner(resolve({"cluster": {"mode": "local"}}), lambda *_: None)
    await spawner.place(ASKED)
    await spawner.stop_all()
    assert requests == ["reserved"]


@pytest.mark.parametrize(("mode", "num_cpus"), [("local", 0), ("ray", 1)])
def test_roles_of_a_local_run_reserve_no_cpu(
    mode: str, num_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def spawn(_: type, name: str, *, num_cpus: float, **__: Any) -> Any:
        asked.append(num_cpus)
        return SimpleNamespace(name=name)

    monkeypatch.setattr(spawner_module, "spawn", spawn)
    spawner = RoleSpawner(resolve({"cluster": {"mode": mode}}), lambda *_: None)
    spawner.spawn_one(Spawner, "generator-9")
    assert asked == [num_cpus]


THREADS = {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
GROWS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("name", "num_gpus", "cluster", "expected"),
    [
        ("generator-0", 1.0, {}, {}),
        ("generator-0", 1.0, {"roles": {"generator": {"threads": 4}}}, THREADS),
        ("policy-1", 0.0, {"roles": {"generator": {"threads": 4, "env": {"A": "b"}}}}, {}),
        ("policy-1", 0.0, {"roles": {"policy": {"env": {"A": "b"}}}}, {"A": "b"}),
        ("policy-1", 0.5, {"roles": {"policy": {"env": {"A": "b"}}}}, GROWS | {"A": "b"}),
        ("critic-0", 1.0, {}, GROWS),
        ("reference-0", 1.0, {}, {}),
        ("likelihood-0", 1.0, {}, {}),
        # Whoever sets the allocator sets all of it.
        ("critic-0", 1.0, {"env": {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}}, {}),
    ],
)
def test_each_role_has_its_own_threads_environment_and_allocator(
    name: str,
    num_gpus: float,
    cluster: dict[str, Any],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(spawner_module, "spawn", lambda *_, **keys: given.append(keys))
    spawner = RoleSpawner(resolve({"cluster": {"mode": "local"} | cluster}), lambda *_: None)
    slot = SimpleNamespace(num_gpus=num_gpus, strategy=None, node_id="n")
    monkeypatch.setattr(spawner._placement, "slot", lambda _: slot)
    spawner._make(Spawner, name)
    assert given[0]["environment"] == expected


@pytest.mark.parametrize(("mode", "expected"), [("local", {}), ("ray", GROWS)])
@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_drivers_allocator_counts_where_roles_inherit_its_variables(
    mode: str, variable: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roles on the nodes of a cluster that the run joins have their nodes' variables."""
    monkeypatch.setenv(variable, "expandable_segments:False")
    cluster = resolve({"cluster": {"mode": mode}}).cluster
    assert cluster.environment_of("policy", on_gpu=True) == expected


async def test_capacity_for_a_later_stage_is_requested_only_where_it_lacks(
    requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is released at once: the stages before it need none of it."""
    nodes: list[LiveNode] = []

    def live() -> list[LiveNode]:
        found = [*nodes]
        nodes[:] = [LiveNode("n", Node("10.0.0.1", 4), free=0)]  # all in use by others now
        return found

    monkeypatch.setattr("rlhf_ray.placement.groups.live_nodes", live)
    monkeypatch.setattr("rlhf_ray.placement.groups.POLL_S", 0.0)
    spawner = RoleSpawner(resolve({"cluster": {"mode": "ray"}}), lambda *_: None)
    await spawner.await_capacity(ASKED)
    assert requests == [[POLICY, POLICY, REWARD, GENERATOR], []]
    again = RoleSpawner(resolve({"cluster": {"mode": "ray"}}), lambda *_: None)
    await again.await_capacity(ASKED)
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("name", "num_gpus", "expected"),
    [
        ("generator-0", 1.0, {"VLLM_BATCH_INVARIANT": "1"}),
        ("generator-0", 0.0, {}),
        ("reference-0", 1.0, {}),
    ],
)
def test_generators_on_gpus_compute_alike_in_any_batch_if_asked(
    name: str, num_gpus: float, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(spawner_module, "spawn", lambda *_, **keys: given.append(keys))
    config = resolve({"cluster": {"mode": "local"}, "rollout": {"batch_invariant": True}})
    spawner = RoleSpawner(config, lambda *_: None)
    slot = SimpleNamespace(num_gpus=num_gpus, strategy=None, node_id="n")
    monkeypatch.setattr(spawner._placement, "slot", lambda _: slot)
    spawner._make(Spawner, name)
    assert given[0]["environment"] == expected
