from pathlib import Path

import pytest
import yaml

from rlhf_ray.config import Config, dump, load, resolve
from rlhf_ray.config.load import keys
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.layout import demands


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(*overrides: str) -> str:
    """The message of the error that overrides on the defaults end in."""
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    return str(caught.value)


def test_defaults_are_valid() -> None:
    config = load(None)
    assert config == Config()
    assert config.run.dir == "runs/run"
    assert load(None, ["run.name=mine"]).run.dir == "runs/mine"
    assert load(None, ["run.name=mine", "run.dir=/data/x"]).run.dir == "/data/x"


def test_a_file_lies_over_its_parent_and_overrides_over_both(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "grand.yaml", "ppo: {gamma: 0.9, epochs: 2}\nrun: {seed: 1}\n")
    write(tmp_path / "base" / "parent.yaml", "extends: grand.yaml\nppo: {epochs: 3}\n")
    child = write(
        tmp_path / "child.yaml", "extends: base/parent.yaml\nppo: {gamma: 0.8}\nlora: {r: 4}\n"
    )
    config = load(child, ["lora.r=8", "data.prompts.path=p.jsonl"])
    assert (config.ppo.gamma, config.ppo.epochs, config.run.seed) == (0.8, 3, 1)
    assert config.lora.r == 8
    assert config.data.prompts is not None
    assert [source.path for source in config.data.prompts] == ["p.jsonl"]


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml extends itself through .*b\.yaml"):
        load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo: [", "is not valid YAML"),
        ("- 1\n- 2\n", "must be a mapping of keys to values, got a list"),
        ("extends: absent.yaml\n", r"absent\.yaml does not exist"),
    ],
)
def test_files_that_are_no_config_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "c.yaml", text))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path / "c.yaml", "# nothing yet\n")) == Config()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2.5E-4", 2.5e-4),
        ("+1e+1", 10.0),
        ("1", 1.0),
        ("0.5", 0.5),
        ("3_0e-2", 0.3),
    ],
)
def test_numbers_may_be_written_as_people_write_them(
    text: str, value: float, tmp_path: Path
) -> None:
    path = write(tmp_path / "c.yaml", f"ppo: {{learning_rate: {text}}}\n")
    assert load(path).ppo.learning_rate == value
    assert load(None, [f"ppo.learning_rate={text}"]).ppo.learning_rate == value


def test_overrides_are_yaml() -> None:
    config = load(
        None,
        ["run.stages=[ppo, report]", "ppo.kl_target=null", "lora.peft={init_lora_weights: true}"],
    )
    assert config.run.stages == ["ppo", "report"]
    assert config.ppo.kl_target is None
    assert config.lora.peft == {"init_lora_weights": True}


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.delenv("ABSENT", raising=False)
    config = load(
        None,
        [
            "model.path=${MODELS}/small",
            "run.name=${ABSENT:-fallback}",
            "cluster.env={A: '${ABSENT:-}x'}",
        ],
    )
    assert config.model.path == "/models/small"
    assert config.run.name == "fallback"
    assert config.cluster.env == {"A": "x"}
    assert "model.path: environment variable ABSENT is not set" in refused("model.path=${ABSENT}")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # An unknown key: the key, its value, the nearest one that exists.
        ("ppo.iteration=5", ["ppo.iteration", "value 5", "Did you mean ppo.iterations?"]),
        ("learning_rate=1", ["learning_rate", "unknown key", "learning_rate"]),
        ("ppo.temperature=1", ["unknown key", "rollout.temperature"]),
        ("modle.path=x", ["modle", "unknown key"]),
        ("generators.nums=2", ["Did you mean generators.num"]),
        # A wrong type or range: what was expected, what it got.
        ("ppo.batch_size=-8", ["ppo.batch_size", "greater than or equal to 1", "got -8"]),
        ("ppo.batch_size='8'", ["ppo.batch_size", "valid integer", "got '8'"]),
        ("ppo.batch_size=true", ["ppo.batch_size", "valid integer", "got True"]),
        ("ppo.batch_size=8.5", ["ppo.batch_size", "valid integer", "got 8.5"]),
        ("ppo.gamma=1.5", ["ppo.gamma", "less than or equal to 1", "got 1.5"]),
        ("ppo.learning_rate=abc", ["ppo.learning_rate", "valid number", "got 'abc'"]),
        ("ppo.learning_rate=.nan", ["ppo.learning_rate", "greater than 0", "got nan"]),
        ("ppo.advantage=rloo", ["ppo.advantage rloo", "ppo.samples_per_prompt is 1; set it"]),
        ("ppo.max_staleness=9", ["ppo.max_staleness", "less than or equal to 8"]),
        ("ppo.max_staleness=2", ["ppo.max_staleness 2", "ppo.importance_cap (usually 2)"]),
        ("rollout.top_p=0", ["rollout.top_p", "greater than 0"]),
        ("rollout.top_k=1", ["rollout.top_k", "always samples the likeliest token", "use 0"]),
        ("rollout.engine=fake", ["rollout.engine", "'vllm' or 'transformers'", "got 'fake'"]),
        ("cluster.mode=slurm", ["cluster.mode", "'inline'", "got 'slurm'"]),
        ("policy.zero_stage=4", ["policy.zero_stage", "1, 2 or 3", "got 4"]),
        ("run.stages=[ppo, sleep]", ["run.stages", "'prepare'", "got 'sleep'"]),
        ("run.stages=[ppo, ppo]", ["run.stages names ppo more than once"]),
        ("run.stages=[]", ["run.stages", "at least 1 item"]),
        ("ppo=5", ["ppo", "got 5"]),
        ("lora.target_modules=[]", ["lora.target_modules: is an empty list"]),
        ("lora.target_modules=q_proj", ["must be all-linear or a list of module names"]),
        ("model.tiny.num_heads=3", ["3 does not divide hidden_size 128 into heads"]),
        ("prepare.rl=0.3", ["must add up to 1, got 1.15"]),
        # Combinations.
        ("ppo.samples_per_prompt=3", ["ppo.batch_size 64", "samples_per_prompt 3", "63 or 66"]),
        ("ppo.mini_batch_size=48", ["ppo.batch_size 64", "ppo.mini_batch_size 48", "48 or 96"]),
        ("policy.num_ranks=3", ["ppo.mini_batch_size 64", "policy.num_ranks 3", "63 or 66"]),
        ("critic.num_ranks=5", ["ppo.mini_batch_size 64", "critic.num_ranks 5", "60 or 65"]),
        ("sft.train_workers=3", ["sft.batch_size 16", "sft.train_workers 3", "15 or 18"]),
        ("rollout.max_tokens=200", ["128 + rollout.max_tokens 200 = 328", "model.max_length 256"]),
        ("ppo.max_tokens_per_micro_batch=100", ["may have 192 tokens", "at least 192"]),
        ("cluster.mode=inline", ["set rollout.engine=transformers"]),
        # Keys of a library that the config sets itself, with the key that sets them.
        ("model.kwargs={dtype: x}", ["model.kwargs", "'dtype' (set by model.dtype)"]),
        ("lora.peft={r: 4}", ["lora.peft", "'r' (set by lora.r)"]),
        ("lora.peft={use_dora: true}", ["'use_dora': neither merging nor the generators' engine"]),
        ("lora.peft={alpha_pattern: {}}", ["'alpha_pattern'", "supported: exclude_modules, init_"]),
        (
            "lora.peft={init_lora_weights: pissa}",
            ["'pissa' changes the base"],
        ),
        ("lora.r=513", ["lora.r", "less than or equal to 512"]),
        (
            "lora.target_modules=[q_proj, model.embed_tokens]",
            ["names model.embed_tokens, but the gen"],
        ),
        ("lora=null", ["lora: cannot be null, because the policy is always"]),
        (
            "policy.tuning=full",
            ["'full' is not supported", "only an adapter is small"],
        ),
        ("sft.tuning=none", ["sft.tuning", "'lora' or 'full'", "got 'none'"]),
        ("model.compute_dtype=bfloat16", ["needs model.quantization nf4, got none"]),
        ("model.rope_scaling={factor: 2.0}", ["needs rope_type, one of linear", "got None"]),
        ("model.rope_scaling={rope_type: yarn}", ["lacks factor, which rope_type yarn needs"]),
        ("model.kwargs={rope_parameters: {}}", ["set by model.rope_scaling"]),
        (
            "rollout.engine_args={hf_overrides: {rope_parameters: {}}}",
            ["hf_overrides may not contain 'rope_parameters'", "set model.rope_scaling"],
        ),
        ("sft.trainer={max_steps: 4}", ["sft.trainer", "'max_steps' (set by sft.steps)"]),
        ("reward.trainer={seed: 4}", ["reward.trainer", "'seed' (set by run.seed)"]),
        ("policy.deepspeed={bf16: {}}", ["policy.deepspeed", "'bf16' (set by model.dtype)"]),
        (
            "critic.deepspeed={zero_optimization: {}}",
            ["set by critic.zero_stage", "critic.deepspeed.zero"],
        ),
        ("sft.trainer={deepspeed: a.json}", ["sft.trainer", "'deepspeed' (set by sft.zero_stage"]),
        ("dpo.deepspeed={zero: {}}", ["no effect without dpo.zero_stage; set dpo.zero_stage=2"]),
        ("pretrain.zero_stage=0", ["pretrain.zero_stage", "1, 2 or 3", "got 0"]),
        ("sft.deepspeed={bf16: {}}", ["sft.deepspeed", "'bf16' (set by model.dtype)"]),
        ("sft.deepspeed={zero: {stage: 1}}", ["sft.deepspeed.zero", "(set by sft.zero_stage)"]),
        ("sft.deepspeed={zero: 3}", ["sft.deepspeed.zero: expected a mapping, got 3"]),
        ("rollout.engine_args={seed: 1}", ["rollout.engine_args", "'seed' (set by run.seed)"]),
        # Secrets have no place in a config; what was written is not repeated.
        (
            "trackers.wandb={api_key: abc}",
            ["wandb: may not contain 'api_key'", "WANDB_API_KEY"],
        ),
        ("trackers.mlflow={tracking_uri: 'http://a:b@c'}", ["holds a login", "MLFLOW_TRACKING"]),
        ("trackers.wandb={mode: of}", ["trackers.wandb.mode", "'offline'", "got 'of'"]),
        # Overrides that are none.
        ("ppo.gamma", ["must have the form dotted.key=value"]),
        ("=5", ["must have the form dotted.key=value"]),
        ("ppo.gamma=[", ["the value is not valid YAML"]),
    ],
)
def test_what_is_wrong_is_refused_by_name(override: str, parts: list[str]) -> None:
    message = refused(override)
    for part in parts:
        assert part in message


def test_further_combinations_are_refused() -> None:
    inline = ["cluster.mode=inline", "rollout.engine=transformers"]
    message = refused(*inline, "policy.num_ranks=2", "generators.num=3")
    assert "set policy.num_ranks=2, generators.num=3 to 1" in message
    message = refused("generators.tensor_parallel_size=2", *inline)
    assert "tensor_parallel_size 2 needs rollout.engine vllm, got transformers" in message
    message = refused("generators.tensor_parallel_size=2", "rollout.serving=merged")
    assert "merged cannot be verified with generators.tensor_parallel_size 2" in message
    message = refused("generators.tensor_parallel_size=2", "placement.gpus=0.5")
    assert "placement.generator.gpus or placement.gpus gives a generator 0.5" in message
    message = refused("placement.share=[[policy, reward], [reward]]")
    assert "placement.share: names reward more than once" in message
    message = refused("placement.share=[[policies]]")
    assert "'policies'" in message
    turns = ("placement.turns=true", "placement.gpus=0.5")
    message = refused(turns[0])
    assert "placement.turns needs roles that share GPUs, but each policy has a whole one" in message
    message = refused(*turns, "placement.generator.gpus=1.0")
    assert "each generator has a whole one" in message
    message = refused(*turns, "ppo.max_staleness=1", "ppo.allow_uncorrected=true")
    assert "ppo.max_staleness 1 at the same time; set ppo.max_staleness=0" in message
    message = refused(*turns, "model.quantization=int8")
    assert "model.quantization int8 does not allow" in message
    message = refused(*turns, "critic.zero_stage=3")
    assert "critic.zero_stage 3 shards them; set critic.zero_stage=2" in message
    message = refused("placement.reward.gpus=2")
    assert "placement.reward.gpus" in message
    message = refused("model.quantization=nf4", "critic.zero_stage=3")
    assert "critic.zero_stage 3 cannot shard the base with model.quantization nf4" in message
    for stage in ("sft", "reward", "dpo"):
        message = refused("model.quantization=int8", f"{stage}.zero_stage=2")
        assert f"with model.quantization int8; set {stage}.zero_stage=null" in message
    message = refused("critic.init=reward", "critic.path=some/model")
    assert "critic.init reward and critic.path 'some/model' both set the critic's" in message
    message = refused("reference.kind=policy_base", "reference.num_workers=2")
    assert "reference.num_workers 2 has no effect with reference.kind policy_base" in message
    message = refused("model.quantization=int8", "reward.tuning=full")
    assert "set reward.tuning=lora or model.quantization=none" in message
    assert load(None, [*inline]).serving == "merged"


def test_a_key_below_a_value_is_refused() -> None:
    message = refused("run.name=a", "run.name.first=b")
    assert "name is a value, not a section" in message


def test_every_mistake_is_listed_at_once() -> None:
    message = refused("ppo.batch_size=-1", "ppo.gama=0.9", "lora.r=0")
    assert len(message.splitlines()) == 4
    for part in ("ppo.batch_size", "ppo.gamma", "lora.r"):
        assert part in message


def test_dump_and_resolve_are_inverse() -> None:
    config = load(None, ["ppo.learning_rate=1e-5", "run.name=x", "data.sft.path=s.jsonl"])
    assert resolve(yaml.safe_load(dump(config))) == config


def test_a_refused_secret_is_not_repeated() -> None:
    assert "s3cret" not in refused("trackers.wandb={api_key: s3cret}")
    assert "s3cret" not in refused("trackers.mlflow={tracking_uri: 'http://a:s3cret@c'}")


def test_every_key_is_listed() -> None:
    listed = set(keys())
    assert {"ppo", "ppo.iterations", "sft.lora.r", "data.prompts.columns", "critic.lora"} <= listed


@pytest.mark.parametrize(
    ("overrides", "serving"),
    [
        ([], "merged"),
        (["model.dtype=bfloat16"], "adapter"),
        (["model.dtype=bfloat16", "rollout.dtype=float32"], "merged"),
        (["rollout.serving=adapter"], "adapter"),
        (["generators.tensor_parallel_size=2"], "adapter"),
        (["model.dtype=bfloat16", "rollout.serving=merged"], "merged"),
    ],
)
def test_serving_follows_the_engines_type(overrides: list[str], serving: str) -> None:
    assert load(None, overrides).serving == serving


SHIPPED = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load(path)
    assert resolve(yaml.safe_load(dump(config))) == config


def test_configs_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize(
    ("name", "num_gpus"),
    [("qwen25_0_5b_1gpu", 1), ("qwen3_8b", 8), ("llama31_8b_instruct", 8), ("qwen25_32b_tp", 16)],
)
def test_presets_fit_the_gpus_that_they_are_for(name: str, num_gpus: int) -> None:
    config = load(next(path for path in SHIPPED if path.stem == name))
    assert sum(d.workers * d.gpus for d in demands(config)) == num_gpus
    for stage in (config.sft, config.reward):
        assert stage.train_workers <= num_gpus
