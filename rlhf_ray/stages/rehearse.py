"""The command rehearse: run two iterations of a config's worst case, on the run's own machines.

Prompts and responses have their largest lengths, and a generator is killed between the iterations.
The measurements are written to ``rehearsal.json``, which the command plan uses.
"""

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
import yaml

from rlhf_ray.cluster.current_job import name_current_job
from rlhf_ray.config import Config, dump, resolve
from rlhf_ray.disk import write_atomically
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.lasting_output import keep_output
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.placement.layout import RUN_MODELS
from rlhf_ray.planning.plan import nodes_of
from rlhf_ray.planning.rehearsal import RESULT, Rehearsal, gpus_of, load, worst_keys
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.runs.folder import RunFolder, absolute
from rlhf_ray.stages.pipeline import run as run_pipeline

FOLDER = "rehearsal"
"""Folder of the rehearsal, a run of its own, inside the run's folder."""
PHASES = ("gen", "score", "learn", "commit", "sync", "save")
VICTIM = "generator-0"


def run(config: Config, *, kills: bool = True) -> Rehearsal | None:
    """Rehearse, and write the measurements to the run's folder; None: stopped on request.

    Args:
        config: of the run.
        kills: whether a generator is killed on the way.

    Raises:
        ConfigError: PPO is no stage of the run, or there is no model yet to rehearse with.
        RlhfError: whatever would fail in the run.
    """
    keep_output()
    worst = worst_case(config)
    folder = Path(worst.run.dir)
    for path in (folder.parent, folder):
        ControlFiles(path).require_free()
    RunFolder(config).make()
    shutil.rmtree(folder, ignore_errors=True)
    RunFolder(worst).make()
    _write_prompts(folder / "prompts.jsonl", worst)
    name_current_job(config.run.name, folder.parent)  # list the job under the name of the run
    loss = ", and the loss of a generator" if kills else ""
    Progress().say(f"rehearsal: two iterations of the longest rollouts{loss}")
    with _killing_a_generator(worst) if kills else nullcontext():
        run_pipeline(worst)
    if ControlFiles(folder).requested().stop:
        return None
    summary = json.loads((folder / "ppo" / "summary.json").read_text(encoding="utf-8"))
    result = _measured(config, read_jsonl(folder / "ppo" / "metrics.jsonl"), summary)
    write_atomically(folder.parent / RESULT, json.dumps(result.as_mapping(), indent=2))
    return result


def is_needed(config: Config) -> bool:
    """Return whether the config can be rehearsed and was not yet."""
    try:
        worst_case(config)
    except ConfigError:
        return False
    return load(config, nodes_of(config)) is None


def worst_case(config: Config) -> Config:
    """Make the config of two iterations of the longest rollouts, in a folder of their own.

    Reward sources that ask a service, or read columns of the data, are left out; models stay.
    """
    if "ppo" not in config.run.stages:
        raise ConfigError("A rehearsal is one of PPO, and run.stages does not name it")
    folder = RunFolder(config)
    policy = folder.sft_model()
    values: dict[str, Any] = yaml.safe_load(dump(config))
    rehearsal = folder.path.absolute() / FOLDER
    values["run"] |= {
        "name": f"{config.run.name}-rehearsal",
        "dir": str(rehearsal),
        "stages": ["ppo"],
        "resume": "auto",
    }
    values["sft"]["path"] = policy
    values["reward"]["path"] = _reward_model(folder) or policy
    values["data"] |= {
        "prompts": {"path": str(rehearsal / "prompts.jsonl")},
        "eval": None,
        "overlong": "truncate",
    }
    models = [i for i, source in enumerate(config.rewards) if isinstance(source, RUN_MODELS)]
    length = {"type": "function", "function": f"{__name__}:length"}
    values["rewards"] = [values["rewards"][i] for i in models] or [length]
    for section, keys in worst_keys(config).items():
        values[section] |= keys
    del values["trackers"]
    return resolve(values)


def length(completions: Sequence[str], **_: object) -> list[float]:
    """Reward the number of characters; needs no model."""
    return [float(len(text)) for text in completions]


def _reward_model(folder: RunFolder) -> str | None:
    """Return the run's reward model; None: there is none yet, and the policy's is as large."""
    if folder.config.reward.path:
        return absolute(folder.config.reward.path)
    trained = folder.path / "reward" / "model"
    return str(trained) if folder.summary("reward") is not None else None


def _write_prompts(path: Path, config: Config) -> None:
    """Write random words, at least one token each, so that every prompt is cut at its limit."""
    letters = random.Random(config.run.seed)
    num = max(20, 3 * config.num_prompts_per_iteration)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num):
            words = (
                "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=5))
                for _ in range(config.rollout.max_prompt_tokens)
            )
            file.write(json.dumps({"prompt": " ".join(words)}) + "\n")


@contextmanager
def _killing_a_generator(config: Config) -> Iterator[None]:
    """Kill a generator in the background, once the first iteration is recorded."""
    over = threading.Event()
    metrics = Path(config.run.dir) / "ppo" / "metrics.jsonl"

    def kill_one() -> None:
        while not over.wait(0.05):
            if metrics.is_file() and metrics.read_bytes().count(b"\n"):
                with suppress(ValueError):  # the run has ended already
                    ray.kill(ray.get_actor(VICTIM))
                return

    killer = threading.Thread(target=kill_one, daemon=True)
    if config.cluster.runs_on_ray:
        killer.start()
    try:
        yield
    finally:
        over.set()
        if killer.ident is not None:
            killer.join()


def _measured(
    config: Config, records: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
) -> Rehearsal:
    seconds = {
        # The faster iteration: the first one warms its processes up, the second loses a generator.
        phase: min(measured)
        for phase in PHASES
        if (measured := [r[f"timing_s/{phase}"] for r in records if f"timing_s/{phase}" in r])
    }
    return Rehearsal(
        when=time.strftime("%Y-%m-%d %H:%M"),
        config=dump(config),
        gpus=gpus_of(nodes_of(config)),
        seconds=seconds,
        peak_memory_bytes=summary["peak_memory_bytes"],
        samples=summary["samples_learnt"],
        generator_restarts=summary["generator_restarts"],
    )
