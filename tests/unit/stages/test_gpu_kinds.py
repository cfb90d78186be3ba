"""What a kind of GPU, or a build for GPUs, cannot do is refused before any stage."""

import pytest
from gpu_machines import QUICK, machine, settled

from rlhf_ray.config import load
from rlhf_ray.config.stages import STAGES
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.prediction import prediction, unservable
from rlhf_ray.stages import gpu_layout
from rlhf_ray.stages.gpu_layout import settle_layout

pytestmark = pytest.mark.usefixtures("outside_ray", "offline")


def test_vllms_build_for_gpus_is_refused_where_generators_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    machine(monkeypatch, Node("this machine", 0))
    assert settle_layout(load(QUICK), STAGES, print) == load(QUICK)
    build = SimpleNamespace(version="0.32.0")
    monkeypatch.setattr(gpu_layout.metadata, "distributions", lambda name: [build])
    with pytest.raises(ConfigError, match=r"vLLM 0.32.0 is a build for GPUs, .*placement.gpus=0"):
        settle_layout(load(QUICK, ["placement.gpus=0"]), STAGES, print)
    settle_layout(load(QUICK, ["rollout.engine=transformers"]), STAGES, print)
    settle_layout(load(QUICK), ["pretrain", "sft"], print)


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        (["rollout.serving=adapter"], "rollout.dtype=bfloat16 or rollout.serving=merged"),
        (["generators.tensor_parallel_size=2"], "set rollout.dtype=bfloat16. No stage"),
    ],
)
def test_an_adapter_in_float32_on_gpus_is_refused_before_any_stage(
    keys: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node("this machine", 8, gpu_kind="A10G-24GB", gpu_memory_gb=24.1)
    with pytest.raises(ConfigError, match=r"rollout\.dtype is float32") as refusal:
        settled(monkeypatch, node, QUICK, "model.dtype=float32", *keys)
    assert remedy in str(refusal.value)
    config = load(QUICK, ["model.dtype=float32", *keys])
    assert any("float32" in short.reason for short in prediction(config, [node]).shortages)
    settled(monkeypatch, node, QUICK, "model.dtype=bfloat16", *keys)
    on_cpus = load(QUICK, ["model.dtype=float32", *keys])
    assert unservable(on_cpus, [Node("this machine", 0)]) is None


T4 = Node("this machine", 8, gpu_kind="T4-16GB", gpu_memory_gb=15.8)


OLD = Node("this machine", 8, gpu_memory_gb=22.0, has_bf16=False)


MANY = Node("this machine", 8, gpu_kind="A10G-24GB", gpu_memory_gb=24.1)


@pytest.mark.parametrize(
    ("node", "keys", "what"),
    [
        (T4, ["model.dtype=bfloat16"], "no bfloat16 on GPUs before Ampere.*rollout.dtype=float16"),
        (OLD, ["rollout.dtype=bfloat16", "ppo.importance_cap=2"], "no bfloat16 on GPUs"),
        (T4, ["rollout.serving=adapter"], "float32; set rollout.dtype=float16"),
        (MANY, ["rollout.top_k=50"], "rollout.top_k 50 would bias .*Set ppo.importance_cap"),
        (
            MANY,
            ["rollout.top_p=0.9", "rollout.engine=transformers"],
            "rollout.top_p 0.9 would bias",
        ),
        (
            MANY,
            ["rollout.top_k=50", "rollout.engine=transformers", "cluster.mode=inline"],
            "rollout.top_k 50 would bias",
        ),
    ],
)
def test_what_the_kind_of_gpu_cannot_do_is_refused_before_any_stage(
    node: Node, keys: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["model.dtype=float32", *keys]
    with pytest.raises(ConfigError, match=f"ppo cannot start: .*{what}.*No stage has begun"):
        settled(monkeypatch, node, QUICK, *keys)
    assert not prediction(load(QUICK, keys), [node]).fits
    on_cpus = load(QUICK, [*keys, "placement.gpus=0"])
    assert unservable(on_cpus, [node]) is None
    assert unservable(load(QUICK, keys), [Node("this machine", 0)]) is None


def test_a_joined_cluster_with_whole_gpus_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["cluster.mode=ray", "model.dtype=float32"]
    for refused in ("rollout.top_k=50", "rollout.serving=adapter"):
        with pytest.raises(ConfigError, match="ppo cannot start"):
            settle_layout(load(QUICK, [*keys, refused]), STAGES, print)
    on_cpus = load(QUICK, [*keys, "rollout.top_k=50", "placement.gpus=0"])
    assert settle_layout(on_cpus, ["ppo"], print) == on_cpus
