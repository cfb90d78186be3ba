"""Stage evaluate: SFT against what PPO and DPO made of it, same held-out prompts and seeds."""

import asyncio
import json
import time
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from rlhf_ray.cluster.role_clients import GeneratorPool, ScorerClient
from rlhf_ray.config import Config
from rlhf_ray.data.synthetic import gold_score
from rlhf_ray.driver.batches import sample_requests, shard_requests
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.driver.scoring import mean_score
from rlhf_ray.driver.weight_sync import publish_to
from rlhf_ray.errors import DataError
from rlhf_ray.models.adapters import digest, tensors_from_bytes, tensors_to_bytes
from rlhf_ray.models.folders import ADAPTER_CONFIG
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.rewards.combine import raw_sums
from rlhf_ray.stages.ppo import held_out_prompts
from rlhf_ray.stages.ppo_roles import RoleSpawner, spawn_generators, spawn_scorers
from rlhf_ray.stages.run_folder import RunFolder, write_atomically
from rlhf_ray.types import AdapterUpdate, Prompt, Rollout

Sample = dict[str, Any]


def run(config: Config) -> dict[str, Any]:
    """Sample every model, rate, compare; returns the summary that it wrote.

    Raises:
        DataError: there is no trained policy.
    """
    started = time.monotonic()
    folder = RunFolder(config)
    folder.stage("evaluate")
    policy_model = folder.sft_model()
    saved = Checkpoints(folder.path / "checkpoints", config.ppo.keep_checkpoints, {}).latest()
    trained = _dpo_policy(folder) | ({"ppo": saved.policy} if saved else {})
    if not trained:
        raise DataError(
            f"{folder.path}/checkpoints holds no policy: run the stage ppo first, or dpo"
        )
    adapters = {"sft": zero_adapter(next(iter(trained.values()))), **trained}
    prompts = held_out_prompts(
        config, folder, load_tokenizer(policy_model), config.evaluate.num_prompts
    )

    progress = Progress(config.run.stages)
    with progress.stage("evaluate", len(adapters) * len(prompts), "sample") as bar:
        compare = partial(_sample_models, config, policy_model, folder.reward_model(), adapters)
        samples = asyncio.run(compare(prompts, bar))
    has_gold = is_synthetic(config, folder)
    if has_gold:
        _add_gold(samples)
    _write_samples(folder, samples, prompts)
    summary = summarize(samples, config.evaluate.bootstrap, config.run.seed) | {
        "num_prompts": len(prompts),
        "judge": "gold" if has_gold else "reward",
        "policy_version": saved.version if saved else None,
        "seconds": time.monotonic() - started,
    }
    folder.write_summary("evaluate", summary)
    return summary


def _dpo_policy(folder: RunFolder) -> dict[str, dict[str, bytes]]:
    """The stage dpo's adapter as files, under its name; empty where that stage has not run."""
    if folder.summary("dpo") is None:
        return {}
    model = folder.path / "dpo" / "model"
    names = (ADAPTER_CONFIG, "adapter_model.safetensors")
    return {"dpo": {name: (model / name).read_bytes() for name in names}}


def zero_adapter(files: dict[str, bytes]) -> dict[str, bytes]:
    """An adapter of the same shape that leaves the SFT model as it is."""
    state = tensors_from_bytes(files["adapter_model.safetensors"])
    zero = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in state.items()}
    return {**files, "adapter_model.safetensors": tensors_to_bytes(zero)}


def is_synthetic(config: Config, folder: RunFolder) -> bool:
    """Whether the held-out questions are the synthetic site's, whose gold score is known."""
    prepared = folder.summary("prepare")
    own = config.data.eval or config.data.prompts
    return own is None and prepared is not None and bool(prepared["synthetic"])


async def _sample_models(
    config: Config,
    policy_model: str,
    reward_model: str | None,
    adapters: dict[str, dict[str, bytes]],
    prompts: Sequence[Prompt],
    bar: Bar,
) -> dict[str, list[Sample]]:
    spawner = RoleSpawner(config, lambda *_: None)
    generators = spawn_generators(spawner, config, policy_model)
    scorers = spawn_scorers(spawner, config, reward_model, policy_model)
    try:
        await spawner.start_all([])
        return {
            name: await _sample_one(
                config, generators, scorers, spawner, version, files, prompts, bar
            )
            for version, (name, files) in enumerate(adapters.items())
        }
    finally:
        await spawner.stop_all()


async def _sample_one(
    config: Config,
    generators: GeneratorPool,
    scorers: ScorerClient,
    spawner: RoleSpawner,
    version: int,
    files: dict[str, bytes],
    prompts: Sequence[Prompt],
    bar: Bar,
) -> list[Sample]:
    tensors = files["adapter_model.safetensors"]
    update = AdapterUpdate(
        version,
        digest(tensors_from_bytes(tensors)),
        json.loads(files["adapter_config.json"]),
        tensors,
    )
    await asyncio.gather(*(publish_to(generator, update) for generator in generators.members))
    requests = shard_requests(
        sample_requests(prompts, 1, config.run.seed, "evaluate"), config.rollout.shard_size, version
    )
    samples: list[Sample] = []
    async for shard in generators.generate(requests):
        scores = raw_sums(config.rewards, await scorers.score(shard))
        rollouts: list[Rollout] = await spawner.fetch(shard.rollouts)
        samples += [
            {"position": r.position, "prompt": r.prompt, "text": r.text, "reward": score}
            for r, score in zip(rollouts, scores, strict=True)
        ]
        bar.advance(len(rollouts))
    return sorted(samples, key=lambda sample: sample["position"])


def _add_gold(samples: dict[str, list[Sample]]) -> None:
    for rows in samples.values():
        for row in rows:
            row["gold"] = gold_score(row["prompt"].fields["question"], row["text"])


def _write_samples(
    folder: RunFolder, samples: dict[str, list[Sample]], prompts: Sequence[Prompt]
) -> None:
    lines = []
    for index, prompt in enumerate(prompts):
        sides = {
            name: {
                key: rows[index][key] for key in ("text", "reward", "gold") if key in rows[index]
            }
            for name, rows in samples.items()
        }
        lines.append(json.dumps({"prompt": prompt.text, **sides}))
    write_atomically(folder.stage("evaluate") / "samples.jsonl", "\n".join(lines) + "\n")


def summarize(samples: dict[str, list[Sample]], resamples: int, seed: int) -> dict[str, Any]:
    """Means of each model and win rates over sft, judged by gold score if there is one.

    ``win_rate`` is that of the last model: ppo where it ran. A response without a reward counts in
    no mean, and its prompt in no win rate.

    Raises:
        RlhfError: nothing is left to compare.
    """
    judge = "gold" if "gold" in samples["sft"][0] else "reward"
    models: dict[str, dict[str, Any]] = {}
    for name, rows in samples.items():
        models[name] = {"reward_mean": mean_score([row["reward"] for row in rows])}
        if judge == "gold":
            models[name]["gold_mean"] = fmean(row["gold"] for row in rows)
        if name != "sft":
            models[name]["win_rate"] = _win_rate(rows, samples["sft"], judge, resamples, seed)
    last = next(reversed(models))
    return {"models": models, "win_rate": models[last]["win_rate"]}


def _win_rate(
    ours: list[Sample], theirs: list[Sample], judge: str, resamples: int, seed: int
) -> dict[str, Any]:
    pairs = [(a[judge], b[judge]) for a, b in zip(ours, theirs, strict=True)]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        raise DataError(
            f"For none of the {len(pairs)} held-out prompts do the sources of rewards have a score "
            "of both models' responses; see docs/rewards.md on missing scores"
        )
    wins = np.array([win(a, b) for a, b in known])
    low, high = bootstrap_interval(wins, resamples, seed)
    return {"value": float(wins.mean()), "ci95": [low, high]}


def win(ours: float, theirs: float) -> float:
    """1 for a win, 0 for a loss, a half for a tie."""
    return 0.5 if ours == theirs else float(ours > theirs)


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean, by resampling the prompts."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
