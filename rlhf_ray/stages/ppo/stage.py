"""Stage ppo: wires roles, data and checkpoints into the loop of `driver.ppo_loop`."""

import asyncio
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_ray import interruption
from rlhf_ray.algorithms.advantages import resolve
from rlhf_ray.config import Config
from rlhf_ray.driver.batches import PromptCursor
from rlhf_ray.driver.checkpoint import Checkpoints, RunState, SavedCommit
from rlhf_ray.driver.evaluation import Evaluator
from rlhf_ray.driver.guards import Guards, damaged_commits
from rlhf_ray.driver.mismatch import NF4_CEILING
from rlhf_ray.driver.ppo_loop import LoopParts, PpoLoop
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.driver.weight_sync import WeightSync, probe_requests
from rlhf_ray.engines.scoring import template_checks
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import folders
from rlhf_ray.models.folders import BASE_MODEL
from rlhf_ray.models.load_arguments import own_device
from rlhf_ray.models.merging import verify_names
from rlhf_ray.models.stop_conditions import generation_config
from rlhf_ray.models.tokenizers import load_tokenizer, save_tokenizer, token_text
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.observability.ray_metrics import ray_sinks
from rlhf_ray.observability.tracing import Tracer
from rlhf_ray.roles import Roles
from rlhf_ray.runs.datasets import RENDERED, ppo_prompts
from rlhf_ray.runs.folder import RunFolder, located_function
from rlhf_ray.stages.ppo.control import controlled
from rlhf_ray.stages.ppo.roles import begin_roles, ppo_roles
from rlhf_ray.stages.ppo.watchdog import watched
from rlhf_ray.types import Prompt


def run(config: Config) -> dict[str, object]:
    """Train the policy from the run's last commit; returns the summary that it wrote.

    Raises:
        RlhfError: naming the role, the numbers and the remedy.
    """
    config = _with_located_functions(config)
    folder = RunFolder(config)
    policy_model, reward_model = folder.sft_model(), folder.reward_model()
    folders.require_whole(policy_model, "ppo")
    tokenizer = load_tokenizer(policy_model, config.model)
    critic_model = _critic_model(folder, tokenizer)
    begin_roles(config, policy_model, reward_model, critic_model)
    checks = template_checks(config, reward_model, policy_model)
    prompts, eval_prompts, dropped = ppo_prompts(config, folder, tokenizer, checks)
    checkpoints = _checkpoints(folder, tokenizer, {"policy": policy_model, "critic": critic_model})
    saved = checkpoints.latest()
    state = _state_of(saved).weighing([source.weight for source in config.rewards])
    tracer = Tracer(folder.path / "trace.json", config.run.name)
    recorder = _recorder(folder, tracer, state.iteration if saved else None)
    progress = Progress(config.run.stages)

    async def train(bar: Bar) -> dict[str, object]:
        async with ppo_roles(
            config, policy_model, reward_model, critic_model, recorder, progress.say
        ) as roles:
            await _restore(roles, saved, Guards(config.guards, recorder))
            progress.say("ppo: all roles are ready; verifying that generators serve their adapter")
            parts = LoopParts(
                config=config,
                roles=roles,
                cursor=PromptCursor(prompts, config.run.seed),
                sync=_weight_sync(config, roles, prompts),
                evaluator=Evaluator(
                    eval_prompts, config.rewards, config.rollout.shard_size, config.run.seed
                ),
                checkpoints=checkpoints,
                recorder=recorder,
                state=state,
                bar=bar,
                token_text=partial(token_text, tokenizer),
            )
            loop = PpoLoop(parts)
            async with controlled(folder.path, loop, roles.generators, bar, recorder, progress.say):
                with watched(config, folder.path, loop, recorder, progress.say):
                    return {**await loop.run(), "num_gpus": roles.num_gpus()}

    try:
        with progress.stage("ppo", config.ppo.iterations, "iteration", done=state.iteration) as bar:
            summary = interruption.run(train(bar)) | {"prompts_dropped": dropped}
    finally:
        recorder.close()
        tracer.close()
    return _finish(folder, summary)


def _recorder(folder: RunFolder, tracer: Tracer, resumed_at: int | None) -> Recorder:
    config = folder.config
    sinks = ray_sinks(config.run.name, "driver")
    sources = [source.name for source in config.rewards]
    return Recorder(folder.stage("ppo"), tracer, config.trackers, resumed_at, sinks, sources)


def begin_ahead(config: Config) -> None:
    """Start PPO's processes while the reward model is trained: a core is free then."""
    config = _with_located_functions(config)
    folder = RunFolder(config)
    needs_critic = resolve(config.ppo.advantage).needs_critic
    begin_roles(
        config,
        folder.sft_model(),
        folder.reward_model(to_be=True),
        folder.critic_model(to_be=True) if needs_critic else None,
    )


def _finish(folder: RunFolder, summary: dict[str, object]) -> dict[str, object]:
    """Write the summary once the last commit, written from bytes, fits as a folder of a model."""
    policy = folder.path / "checkpoints" / "latest" / "policy"
    verify_names(str(policy), folder.config.model, is_lm=True)
    folder.write_summary("ppo", summary)
    for rendered in (folder.path / "ppo" / RENDERED).glob("*"):
        shutil.rmtree(rendered, ignore_errors=True)
    return summary


def _weight_sync(config: Config, roles: Roles, prompts: Sequence[Prompt]) -> WeightSync:
    probe_prompts = probe_requests(prompts, config.rollout.max_prompt_tokens, config.run.seed)
    on_gpu = roles.num_gpus() > 0 or (
        not config.cluster.runs_on_ray and own_device().type == "cuda"
    )
    # Triton and cuBLAS may round fp32 to TF32: exactness is a matter of devices, too.
    is_exact = config.engine_is_exact and not on_gpu
    try:
        config.require_corrected_truncation(is_exact)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    nf4 = NF4_CEILING if config.model.quantization == "nf4" else None
    return WeightSync(roles.policy, probe_prompts, is_exact, config.rollout.max_gap or nf4)


def _with_located_functions(config: Config) -> Config:
    """Name the user's files by absolute path: a learner's process may run in another folder."""
    keys = ("advantage", "policy_loss")
    located = {key: located_function(getattr(config.ppo, key)) for key in keys}
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=located)})


def _critic_model(folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what the critic starts from; None where the advantages need no critic."""
    if not resolve(folder.config.ppo.advantage).needs_critic:
        return None
    critic_model = folder.critic_model()
    if load_tokenizer(critic_model, folder.config.model).get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"{critic_model} cannot be the critic: its tokenizer is not the policy's, and a critic "
            "reads the policy's tokens; set critic.init=sft and leave critic.path out, or name a "
            "model with the policy's tokenizer"
        )
    return critic_model


async def _restore(roles: Roles, saved: SavedCommit | None, guards: Guards) -> None:
    if saved is not None:
        if saved.damaged:
            guards.warn(saved.progress["iteration"], damaged_commits(saved))
        states = {"policy": saved.policy, "critic": saved.critic}
        await asyncio.gather(
            *(learner.load(states[name]) for name, learner in roles.learners.items())
        )


def _state_of(saved: SavedCommit | None) -> RunState:
    if saved is None:
        return RunState()
    # A run of another version may have saved other fields.
    known = {field.name for field in fields(RunState)}
    return RunState(**{name: value for name, value in saved.progress.items() if name in known})


def _checkpoints(
    folder: RunFolder, tokenizer: PreTrainedTokenizerBase, bases: Mapping[str, str | None]
) -> Checkpoints:
    files = {name: _static_files(tokenizer, base, folder) for name, base in bases.items() if base}
    ppo = folder.config.ppo
    return Checkpoints(folder.path / "checkpoints", ppo.keep_checkpoints, files, ppo.adapters_every)


def _static_files(
    tokenizer: PreTrainedTokenizerBase, base: str, folder: RunFolder
) -> dict[str, bytes]:
    """Return what a committed PEFT folder holds besides its adapter: all that generating needs."""
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(tokenizer, scratch)
        generation_config(base, folder.config.template, folder.config.model).save_pretrained(
            scratch
        )
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
    if Path(base).is_dir():
        committed = folder.path / "checkpoints" / "0" / "policy"
        files[BASE_MODEL] = folders.relative_base(committed, base).encode()
    return files
