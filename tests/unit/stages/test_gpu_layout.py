"""The GPU layout of a run: what is chosen on shared GPUs, and what is refused before any stage."""

from pathlib import Path
from typing import Any

import pytest
from gpu_machines import QUICK, QWEN, machine, settled

from rlhf_ray.config import Config, load
from rlhf_ray.config.stages import STAGES
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.layout import Node, demands, fit, held_at_once
from rlhf_ray.planning.plan import arranged, plan_for
from rlhf_ray.planning.prediction import left_for_engine, on_gpus, prediction
from rlhf_ray.planning.tables import as_text
from rlhf_ray.stages import gpu_layout, pipeline
from rlhf_ray.stages.gpu_layout import settle_layout

pytestmark = pytest.mark.usefixtures("outside_ray", "offline")

CACHE, SHARE = "kv_cache_memory_bytes", "gpu_memory_utilization"
A10G = Node("this machine", 1, gpu_kind="A10G-24GB", gpu_memory_gb=24.1)


@pytest.mark.parametrize("path", [QUICK, QWEN])
@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_every_stage_of_a_run_fits_a_machine_with_few_gpus(
    path: Path, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five roles on one GPU of 24 GB; the engine takes what the others leave."""
    node = Node("this machine", gpus, gpu_kind="A10G-24GB", gpu_memory_gb=24.1)
    config = settled(monkeypatch, node, path)
    assert all(fit(asked, [node]) for asked in held_at_once(config, config.run.stages).values())
    plan = prediction(config, [node])
    assert plan.fits
    assert plan.sequences >= 1
    shared = [held for held in on_gpus(plan.roles, plan.places).values() if len(held) > 1]
    is_shared = any(role.role == "generator" for held in shared for role in held)
    assert (CACHE in config.rollout.engine_args) == is_shared


def test_a_machine_with_a_gpu_for_each_worker_gives_it_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone on its GPU, vLLM may measure what is free."""
    node = Node("this machine", 5, gpu_kind="A10G-24GB")
    config = settled(monkeypatch, node, QUICK)
    assert config == load(QUICK)
    assert {demand.gpus for demand in demands(config)} == {1.0}


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ([f"rollout.engine_args={{{SHARE}: 0.3}}"], {SHARE: 0.3}),
        ([f"rollout.engine_args={{{CACHE}: 1000000000}}"], {CACHE: 10**9}),
        (
            [f"rollout.engine_args={{{CACHE}: 1000000000, {SHARE}: 0.25, enforce_eager: true}}"],
            {CACHE: 10**9, SHARE: 0.25, "enforce_eager": True},
        ),
    ],
)
def test_what_is_set_of_an_engines_memory_stays(
    keys: list[str], kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = settled(monkeypatch, A10G, QUICK, *keys).rollout.engine_args
    assert kept.items() <= args.items()
    assert {CACHE, SHARE} <= args.keys()
    if SHARE in kept and CACHE not in kept:  # the cache is what the share leaves
        held = 2.5e9 + 256 * 16 * load(QUICK).model.tiny.vocab_size
        assert 0.3 * 24.1e9 - held - 1e7 < args[CACHE] < 0.3 * 24.1e9 - held
    if CACHE in kept and SHARE not in kept:  # vLLM would ask for 92% of the GPU to be free
        assert 10**9 / 24.1e9 < args[SHARE] < 0.2


def test_a_part_that_is_set_for_roles_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["placement.reward.gpus=0.05", "placement.policy.gpus=0.4"]
    found = {d.role: d.gpus for d in demands(settled(monkeypatch, A10G, QUICK, *keys))}
    assert (found["reward"], found["policy"]) == (0.05, 0.4)
    assert found["critic"] == found["generator"]
    assert sum(found.values()) <= 1


def test_engines_that_share_a_gpu_with_each_other_divide_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = ["generators.num=2", "rollout.shard_size=4096", "model.max_length=4096"]
    config = settled(monkeypatch, A10G, QUICK, "ppo.max_tokens_per_micro_batch=4096", *keys)
    plan = prediction(config, [A10G])
    held = plan.role("generator").total
    others = sum(role.peak for role in plan.roles[:4])
    assert 2 * held + others <= 0.95 * 24.1e9
    assert 2 * held + others > 0.9 * 24.1e9  # so much can be in flight that none is left over


def test_an_engine_that_takes_turns_leaves_what_sleeping_learners_keep() -> None:
    keys = ["placement.gpus=0.2", "rollout.shard_size=4096", "model.max_length=4096"]
    keys += ["ppo.max_tokens_per_micro_batch=4096"]
    awake = arranged(load(QUICK, [*keys]), [A10G]).rollout.engine_args
    turns = arranged(load(QUICK, [*keys, "placement.turns=true"]), [A10G])
    assert turns.rollout.engine_args[CACHE] > awake[CACHE]
    assert prediction(turns, [A10G]).fits


def test_a_gpu_of_an_unknown_kind_is_divided_by_its_measured_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node("this machine", 1, gpu_memory_gb=25.4)
    config = settled(monkeypatch, node, QUICK)
    assert 0 < config.rollout.engine_args[SHARE] < 1
    plan = prediction(config, [node])
    assert plan.fits
    assert plan.time is None
    small = Node("this machine", 1, gpu_memory_gb=4.0)
    machine(monkeypatch, small)
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"ppo cannot start: a generator has 0\.00 GB left"):
        settle_layout(load(QUICK), STAGES, said.append)


def test_a_cluster_that_was_joined_keeps_its_parts_and_gets_the_engines_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = (Node("10.0.0.1", 1, gpu_kind="A100-80GB"),)
    monkeypatch.setattr("rlhf_ray.planning.plan.live_cluster", lambda: nodes)
    whole = load(QUICK, ["cluster.mode=ray"])
    assert settle_layout(whole, STAGES, print) == whole
    shared = settle_layout(load(QUICK, ["cluster.mode=ray", "placement.gpus=0.2"]), STAGES, print)
    assert {CACHE, SHARE} == shared.rollout.engine_args.keys()


def test_memory_that_is_not_known_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["cluster.mode=ray", "placement.gpus=0.2"]
    for nodes, what in (((Node("10.0.0.1", 1),), "10.0.0.1"), ((), "no node has GPUs")):
        monkeypatch.setattr("rlhf_ray.planning.plan.live_cluster", lambda nodes=nodes: nodes)
        with pytest.raises(ConfigError, match=rf"not known yet \({what}\): set rollout.engine_a"):
            settle_layout(load(QUICK, keys), STAGES, print)
        is_set = [*keys, f"rollout.engine_args={{{SHARE}: 0.3}}"]
        assert settle_layout(load(QUICK, is_set), STAGES, print) == load(QUICK, is_set)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["placement.gpus=1"], "ppo cannot start: .*in total 5. Available: this machine 1"),
        (["placement.policy.gpus=1"], "ppo cannot start: "),
        (
            ["sft.train_workers=2", "sft.batch_size=8"],
            r"sft cannot start: .*sft 2 x 1.* with sft\.train_workers=1",
        ),
        (["reward.train_workers=4"], r"reward cannot start: .*reward\.train_workers=1"),
        (["policy.num_ranks=2"], "ppo cannot start: .*policy 2 x 1 "),
        (["generators.tensor_parallel_size=2", "rollout.serving=adapter"], "ppo cannot start: "),
    ],
)
def test_a_layout_that_cannot_start_is_refused_before_any_stage(
    keys: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, A10G)
    begun: list[str] = []
    monkeypatch.setattr(pipeline, "run_stage", lambda _, stage: begun.append(stage))
    with pytest.raises(ConfigError, match=what) as refused:
        pipeline.run(load(QUICK, [f"run.dir={tmp_path / 'run'}", *keys]))
    assert "No stage has begun" in str(refused.value)
    assert begun == []
    stage = what.partition("ppo")[1] or what.split()[0]
    with pytest.raises(ConfigError, match=what):
        pipeline.run_single(load(QUICK, [f"run.dir={tmp_path / 'run'}", *keys]), stage)


def test_the_stages_of_a_run_get_what_was_chosen_and_its_folder_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, the run may resume with other parts."""
    machine(monkeypatch, A10G)
    run: dict[str, Config] = {}
    monkeypatch.setattr(pipeline, "run_stage", lambda config, stage: run.update({stage: config}))
    monkeypatch.setattr(pipeline, "_enter_ray", lambda *_: None)
    folder = pipeline.run(load(QUICK, [f"run.dir={tmp_path / 'run'}"]))
    assert run["ppo"].placement.gpus == run["evaluate"].placement.gpus == 0.2
    assert CACHE in run["ppo"].rollout.engine_args
    saved = load(folder / "config.yaml")
    assert saved.placement.gpus is None
    assert saved.rollout.engine_args == {}


def test_a_single_stage_is_settled_whatever_the_stages_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, A10G)
    seen: list[Config] = []
    monkeypatch.setattr(pipeline, "run_stage", lambda config, _: seen.append(config))
    monkeypatch.setattr(pipeline, "_enter_ray", lambda *_: None)
    config = load(QUICK, [f"run.dir={tmp_path / 'run'}", "run.stages=[sft]"])
    for stage in ("ppo", "evaluate"):
        pipeline.run_single(config, stage)
        assert seen[-1].placement.gpus == 0.2
        assert CACHE in seen[-1].rollout.engine_args
        assert seen[-1].run == config.run


def test_an_engine_starts_and_restarts_with_the_chosen_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own process gets it, so that it measures no memory."""
    pytest.importorskip("vllm")
    from rlhf_ray.models import tiny

    config = settled(monkeypatch, A10G, QUICK)
    base = tmp_path / "base"
    tiny.build(base, ["some text"] * 20, config.model.tiny, max_length=64, seed=0)
    engine: Any = generation_engine(config, str(base), (2,))
    made = engine._engine_args()
    assert made.kv_cache_memory_bytes == config.rollout.engine_args[CACHE]
    assert made.gpu_memory_utilization == config.rollout.engine_args[SHARE]


def test_the_plan_says_what_is_loaded_when_and_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, changes, layouts = plan_for(load(QUICK), "1xA10G-24GB")
    text = as_text(plan, changes, layouts)
    _, _, order = text.partition("loaded in this order")
    lines = [line.split() for line in order.splitlines()[1:7]]
    assert [line[0] for line in lines] == [
        "pretrain",
        "sft",
        "reward",
        "ppo",
        "evaluate",
        "perplexity",
    ]
    assert "generator 1 x 0.2" in order
    assert "measures no free memory" in order
    assert "placement.gpus=0.2" in "".join(plan.assumptions)


def test_a_generator_gets_what_awake_neighbours_leave() -> None:
    plan = prediction(load(QUICK, ["placement.gpus=0.2"]), [A10G])
    (held,) = on_gpus(plan.roles, plan.places).values()
    from rlhf_ray.placement.hardware import GPU_KINDS

    left = left_for_engine(held, GPU_KINDS["A10G-24GB"], turns=False)
    others = sum(role.peak for role in held if role.role != "generator")
    assert left * 24.1e9 + others == pytest.approx(0.95 * 24.1e9)


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("keys", [[], ["placement.gpus=0.2"]])
def test_an_engine_whose_share_is_set_starts_with_models_of_unknown_size(
    gpus: int, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_layout, "_fetch_shapes", lambda _: None)
    node = Node("this machine", gpus, gpu_kind="A10G-24GB", gpu_memory_gb=24.1)
    share = {SHARE: 0.3}
    for model in ("model.path=some/7B", "sft.path=some/7B", "reward.path=some/8B"):
        found = settled(monkeypatch, node, QUICK, model, f"rollout.engine_args={share}", *keys)
        assert found.rollout.engine_args == share
        assert all(fit(asked, [node]) for asked in held_at_once(found, found.run.stages).values())
    for model in ("sft.path=some/7B", "reward.path=some/8B", "critic.path=some/8B"):
        with pytest.raises(ConfigError, match=rf"size of {model} is not known here: set rollout"):
            settled(monkeypatch, A10G, QUICK, model, *keys)


def test_the_size_of_every_model_on_the_hub_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(gpu_layout.PretrainedConfig, "get_config_dict", fetched.append)
    paths = [f"{part}.path=some/{part}" for part in ("model", "sft", "reward", "critic")]
    keys = [*paths, f"rollout.engine_args={{{SHARE}: 0.3}}"]
    settled(monkeypatch, A10G, QUICK, *keys)
    assert fetched == [path.partition("=")[2] for path in paths]


def test_no_cache_is_chosen_that_holds_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes 0 bytes for not set, and would measure what is free."""
    small = Node("this machine", 1, gpu_memory_gb=4.0)
    machine(monkeypatch, small)
    assert CACHE not in arranged(load(QUICK), [small]).rollout.engine_args
    for stage in ("ppo", "evaluate"):
        said: list[str] = []
        with pytest.raises(ConfigError, match=f"{stage} cannot start: a generator has 0.00 GB"):
            settle_layout(load(QUICK), [stage], said.append)
        assert not said


def test_a_chosen_cache_is_of_whole_blocks_and_vllms_own() -> None:
    keys = ["placement.gpus=0.2", "generators.max_in_flight=1", "rollout.shard_size=1"]
    config = arranged(load(QUICK, [*keys, "model.max_length=200"]), [A10G])
    plan = prediction(config, [A10G])
    shape = plan.models.tuned.shape
    token = shape.kv_values_per_token * (2 if config.engine_dtype != "float32" else 4)
    assert config.rollout.engine_args[CACHE] == (208 + 16) * token
    assert plan.sequences == 1
