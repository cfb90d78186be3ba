"""The whole config, and the rules that span its sections."""

from typing import Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.algorithms import ESTIMATORS
from rlhf_ray.config.cluster import ClusterConfig, PlacementConfig
from rlhf_ray.config.data import DataConfig, PrepareConfig, TemplateConfig
from rlhf_ray.config.evaluate import EvaluateConfig
from rlhf_ray.config.guards import GuardsConfig
from rlhf_ray.config.learners import CriticConfig, PolicyConfig, ReferenceConfig
from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.config.rank import RankConfig
from rlhf_ray.config.rewards import (
    EndpointConfig,
    ModelSourceConfig,
    RewardSourceConfig,
    refuse_equal_names,
    refuse_slow,
)
from rlhf_ray.config.rollout import GeneratorsConfig, RolloutConfig
from rlhf_ray.config.section import PassThrough, Section, fixed
from rlhf_ray.config.stages import SUPERVISED, RunConfig
from rlhf_ray.config.supervised import DpoConfig, PretrainConfig, RewardConfig, SftConfig
from rlhf_ray.config.trackers import TrackersConfig


class Config(Section):
    """The whole config of a run."""

    run: RunConfig = fixed(RunConfig(), description="The run.")
    cluster: ClusterConfig = fixed(ClusterConfig(), description="Ray, deadlines, threads.")
    placement: PlacementConfig = fixed(PlacementConfig(), description="Which GPUs the roles get.")
    model: ModelConfig = fixed(ModelConfig(), description="The base model.")
    prepare: PrepareConfig = fixed(PrepareConfig(), description="From a dump to datasets.")
    data: DataConfig = fixed(DataConfig(), description="Your datasets.")
    template: TemplateConfig = fixed(
        TemplateConfig(), description="Text format of prompts and answers."
    )
    pretrain: PretrainConfig = fixed(PretrainConfig(), description="Language modelling.")
    sft: SftConfig = fixed(SftConfig(), description="Supervised fine-tuning.")
    rank: RankConfig = fixed(RankConfig(), description="People's verdicts on pairs of answers.")
    reward: RewardConfig = fixed(RewardConfig(), description="Reward model.")
    dpo: DpoConfig = fixed(DpoConfig(), description="Direct preference optimisation.")
    rewards: list[RewardSourceConfig] = fixed(
        [ModelSourceConfig()],
        min_length=1,
        description="PPO's reward, the sum of these sources; default: the reward model.",
    )
    lora: LoraConfig = fixed(LoraConfig(), description="The policy's adapter.")
    generators: GeneratorsConfig = fixed(GeneratorsConfig(), description="Rollout engines.")
    policy: PolicyConfig = fixed(PolicyConfig(), description="Policy learners.")
    critic: CriticConfig = fixed(CriticConfig(), description="Critic learners.")
    reference: ReferenceConfig = fixed(ReferenceConfig(), description="Frozen reference.")
    ppo: PpoConfig = fixed(PpoConfig(), description="The algorithm.")
    rollout: RolloutConfig = fixed(RolloutConfig(), description="Sampling.")
    guards: GuardsConfig = fixed(GuardsConfig(), description="Detectors of trouble in PPO.")
    evaluate: EvaluateConfig = fixed(EvaluateConfig(), description="Comparison of models.")
    trackers: TrackersConfig = fixed(
        TrackersConfig(), description="Where metrics go besides files."
    )

    @property
    def engine_dtype(self) -> str:
        """Data type of the generators' weights."""
        return self.rollout.dtype or self.model.dtype

    @property
    def engine_is_exact(self) -> bool:
        """Whether engine and learner have the same fp32 weights. GPUs round their products."""
        dtypes = {self.engine_dtype, self.model.dtype}
        return dtypes == {"float32"} and self.model.quantization == "none"

    @property
    def serving(self) -> Literal["adapter", "merged"]:
        """``adapter`` or ``merged``; below float32 merging would round small updates away."""
        if self.rollout.serving != "auto":
            return self.rollout.serving
        whole = self.generators.tensor_parallel_size == 1
        return "merged" if self.engine_dtype == "float32" and whole else "adapter"

    @property
    def largest_rank(self) -> int:
        """Largest rank of the adapters that generators may serve: PPO's, and DPO's in evaluate."""
        return max(self.lora.r, self.dpo.lora.r)

    @property
    def num_adapters(self) -> int:
        """Adapters that an engine has loaded side by side: of each version that may be sampled."""
        is_lora = self.rollout.engine == "vllm" and self.serving == "adapter"
        return 1 + self.ppo.max_staleness if is_lora else 1

    @property
    def num_prompts_per_iteration(self) -> int:
        """Prompts drawn for one iteration."""
        return self.ppo.batch_size // self.ppo.samples_per_prompt

    @field_validator("lora", mode="before")
    @classmethod
    def _policy_is_an_adapter(cls, lora: object) -> object:
        if lora is None:
            raise ValueError(
                "cannot be null, because the policy is always trained as an adapter; leave it out"
            )
        return lora

    @property
    def needs_reward_model(self) -> bool:
        """True if a source is the run's own reward model, or the critic starts from it."""
        is_source = any(
            isinstance(source, ModelSourceConfig) and source.path is None for source in self.rewards
        )
        return is_source or (self.may_have_critic and self.critic.init == "reward")

    @property
    def may_have_critic(self) -> bool:
        """True if the advantage needs values, or is a function of yours, which may need them."""
        estimator = ESTIMATORS.get(self.ppo.advantage)
        return estimator is None or estimator.needs_critic

    def external_model(self, stage: str) -> str | None:
        """The finished model that stands in for a stage (sft.path, reward.path)."""
        return getattr(getattr(self, stage, None), "path", None)

    @field_validator("rewards")
    @classmethod
    def _names_differ(cls, sources: list[RewardSourceConfig]) -> list[RewardSourceConfig]:
        return refuse_equal_names(sources)

    @model_validator(mode="after")
    def _judges_have_pairs(self) -> "Config":
        for name in ("reward", "dpo"):
            if getattr(self, name).judge is not None and self.data.preferences is None:
                raise ValueError(
                    f"{name}.judge labels the rows of data.preferences, which is not set; set it "
                    "to a dataset with the columns prompt, completion_a and completion_b"
                )
        return self

    @model_validator(mode="after")
    def _ratings_are_given(self) -> "Config":
        if "rank" in self.run.stages:
            self.rank.require_mixable(self.reward, self.dpo, self.data)
        is_rated = self.reward.loss != "pairwise" and self.reward.path is None
        if is_rated and self.data.preferences is None:
            raise ValueError(
                f"reward.loss {self.reward.loss} learns from single answers, but prepare writes "
                "pairs; set data.preferences to a dataset with the columns prompt, completion and "
                "label (bce) or score (mse)"
            )
        return self

    @model_validator(mode="after")
    def _sources_give_up_in_time(self) -> "Config":
        for source in self.rewards:
            if isinstance(source, EndpointConfig):
                refuse_slow(f"rewards: {source.name}", source, self.cluster)
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Config":
        ppo = self.ppo
        _require_divisible(
            "ppo.batch_size", ppo.batch_size, "ppo.samples_per_prompt", ppo.samples_per_prompt
        )
        _require_divisible(
            "ppo.batch_size", ppo.batch_size, "ppo.mini_batch_size", ppo.mini_batch_size
        )
        for role, group in (("policy", self.policy), ("critic", self.critic)):
            _require_divisible(
                "ppo.mini_batch_size", ppo.mini_batch_size, f"{role}.num_ranks", group.num_ranks
            )
        for name in SUPERVISED:
            stage = getattr(self, name)
            _require_divisible(
                f"{name}.batch_size", stage.batch_size, f"{name}.train_workers", stage.train_workers
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> "Config":
        longest = self.rollout.max_prompt_tokens + self.rollout.max_tokens
        if longest > self.model.max_length:
            raise ValueError(
                f"rollout.max_prompt_tokens {self.rollout.max_prompt_tokens} + rollout.max_tokens "
                f"{self.rollout.max_tokens} = {longest} tokens exceed model.max_length "
                f"{self.model.max_length}; raise model.max_length or lower one of the others"
            )
        if longest > self.ppo.max_tokens_per_micro_batch:
            raise ValueError(
                f"a rollout may have {longest} tokens, more than ppo.max_tokens_per_micro_batch "
                f"{self.ppo.max_tokens_per_micro_batch}; raise the latter to at least {longest}"
            )
        return self

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        if self.model.quantization != "none":
            self._quantised_base_is_kept()
        self._engine_can_serve_the_policy()
        if self.generators.tensor_parallel_size > 1:
            self._generators_can_be_parallel()
        if self.placement.turns:
            self._colocation_is_possible()
        self.require_corrected_truncation(self.engine_is_exact)
        self.ppo.overlong.require_endings(self.rollout, self.ppo.missing_eos_penalty)
        shard_size, per_prompt = self.rollout.shard_size, self.ppo.samples_per_prompt
        self.ppo.filter_groups.require_whole_groups(per_prompt, shard_size)
        if bounds := self.rollout.autoscale:
            bounds.require_within(self.generators.num)
        if self.cluster.mode == "inline":
            self._inline_is_one_process()
        return self

    def _quantised_base_is_kept(self) -> None:
        """Refuse settings that would shard or train the quantised weights."""
        kind = self.model.quantization
        for role, group in (("policy", self.policy), ("critic", self.critic)):
            if group.zero_stage == 3:
                raise ValueError(
                    f"{role}.zero_stage 3 cannot shard the base with model.quantization {kind}; "
                    f"set {role}.zero_stage=2"
                )
        for name, stage in (("sft", self.sft), ("reward", self.reward), ("dpo", self.dpo)):
            if getattr(stage, "tuning", None) == "full":
                raise ValueError(
                    f"{name}.tuning full trains the weights that model.quantization "
                    f"{kind} freezes; set {name}.tuning=lora or model.quantization=none"
                )
            if stage.zero_stage is not None:
                raise ValueError(
                    f"{name}.zero_stage cannot divide a base with model.quantization {kind}; "
                    f"set {name}.zero_stage=null or model.quantization=none"
                )
        if self.critic.init == "reward" and self.reward.path is None:
            raise ValueError(
                "critic.init reward merges the reward model's adapter into its base, which "
                f"model.quantization {kind} does not allow; set critic.init=sft"
            )

    def _generators_can_be_parallel(self) -> None:
        size = self.generators.tensor_parallel_size
        if self.rollout.engine != "vllm":
            raise ValueError(
                f"generators.tensor_parallel_size {size} needs rollout.engine vllm, got "
                f"{self.rollout.engine}; set it to 1"
            )
        if self.rollout.serving == "merged":
            raise ValueError(
                "rollout.serving merged cannot be verified with generators.tensor_parallel_size "
                f"{size}, which shards every layer over GPUs; use adapter"
            )
        if self.placement.gpus_of("generator") < 1:
            raise ValueError(
                f"generators.tensor_parallel_size {size} needs whole GPUs, but "
                "placement.generator.gpus or placement.gpus gives a generator "
                f"{self.placement.gpus_of('generator'):g}; set generators.tensor_parallel_size=1 "
                "or placement.generator.gpus=1"
            )

    def _colocation_is_possible(self) -> None:
        """Refuse roles that share no GPU, and weights that cannot be moved off theirs."""
        if self.ppo.max_staleness:
            raise ValueError(
                "placement.turns has generators and learners work in turns, ppo.max_staleness "
                f"{self.ppo.max_staleness} at the same time; set ppo.max_staleness=0, or leave "
                "placement.turns out"
            )
        for role in ("policy", "generator"):
            if self.placement.gpus_of(role) == 1:
                raise ValueError(
                    f"placement.turns needs roles that share GPUs, but each {role} has a whole "
                    "one; set placement.gpus=0.5"
                )
        if self.model.quantization != "none":
            raise ValueError(
                "placement.turns moves learners' weights to main memory, which model.quantization "
                f"{self.model.quantization} does not allow; set model.quantization=none"
            )
        for role, group in (("policy", self.policy), ("critic", self.critic)):
            if group.zero_stage == 3:
                raise ValueError(
                    f"placement.turns moves whole weights, but {role}.zero_stage 3 shards them; "
                    f"set {role}.zero_stage=2"
                )

    def _engine_can_serve_the_policy(self) -> None:
        outside = {"embed_tokens", "lm_head", "wte", "wpe", "embed_out", "score", "classifier"}
        for key, lora in (("lora", self.lora), ("dpo.lora", self.dpo.lora)):
            listed = lora.target_modules if isinstance(lora.target_modules, list) else []
            refused = [target for target in listed if target.rpartition(".")[2] in outside]
            if refused:
                raise ValueError(
                    f"{key}.target_modules names {', '.join(refused)}, but the generators' engine "
                    "serves adapters only on linear layers of the blocks, such as q_proj, k_proj, "
                    "v_proj, o_proj, gate_proj, up_proj, down_proj; leave it out"
                )
        overrides: PassThrough = self.rollout.engine_args.get("hf_overrides") or {}
        rope = {"rope_scaling", "rope_parameters"} & set(overrides)
        if rope:
            raise ValueError(
                f"rollout.engine_args.hf_overrides may not contain {rope.pop()!r}, because "
                "learners and engine must agree; set model.rope_scaling"
            )

    def require_corrected_truncation(self, engine_is_exact: bool) -> None:
        """Require importance weights if engine and learner may truncate to different tokens."""
        rollout = self.rollout
        cut = [
            f"rollout.{key} {value}"
            for key, value, off in (("top_k", rollout.top_k, 0), ("top_p", rollout.top_p, 1))
            if value != off
        ]
        if cut and not engine_is_exact and self.ppo.importance_cap is None:
            raise ValueError(
                f"{' and '.join(cut)} would bias the update: engine ({self.engine_dtype}) and "
                f"learner ({self.model.dtype}, quantization {self.model.quantization}) round "
                "differently and may keep different tokens. Set ppo.importance_cap (usually 2) to "
                "correct for it, or use float32 on both sides and CPUs, or leave them out"
            )

    def _inline_is_one_process(self) -> None:
        if self.rollout.engine == "vllm" and "ppo" in self.run.stages:
            raise ValueError(
                "cluster.mode inline cannot start vLLM's processes; set rollout.engine=transformers"
            )
        if self.rollout.autoscale is not None:
            raise ValueError("cluster.mode inline has one generator; leave out rollout.autoscale")
        counts = {
            "policy.num_ranks": self.policy.num_ranks,
            "critic.num_ranks": self.critic.num_ranks,
            "generators.num": self.generators.num,
            "reference.num_workers": self.reference.num_workers,
            "reward.num_workers": self.reward.num_workers,
            **{f"{name}.train_workers": getattr(self, name).train_workers for name in SUPERVISED},
        }
        if plural := [f"{key}={count}" for key, count in counts.items() if count != 1]:
            raise ValueError(f"cluster.mode inline is one process; set {', '.join(plural)} to 1")


def _require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        lower = value - value % by
        nearest = f"{lower} or {lower + by}" if lower else f"{by}"
        raise ValueError(f"{name} {value} is not a multiple of {by_name} {by}; try {nearest}")
