"""Batches in the run's folder, each with the commit before it, so that its step can be replayed.

``ppo/batches/<iteration>/`` holds ``batch.json`` (what the step needs besides its rows, and the
metrics that it gave), ``rows.npz`` (tokens, log-probs, values, scores), ``samples.jsonl`` (texts,
for people), ``config.yaml``, and a folder for each learner group with its state before the step.
"""

import asyncio
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from rlhf_ray.config import Config, dump
from rlhf_ray.disk import DAMAGE
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.driver.guards import Alarm
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.errors import DataError, RlhfError
from rlhf_ray.roles import Fetch
from rlhf_ray.types import (
    Commit,
    Handle,
    Mismatch,
    Prompt,
    Rollout,
    ScoredShard,
    Shard,
    ShardInfo,
    TokenRows,
)

MOST_WARNED = 5
"""Batches with a warning that are kept: the newest. Each may hold the only copy of a commit."""
FOLDER = "batches"
BATCH, ROWS, SAMPLES, CONFIG = "batch.json", "rows.npz", "samples.jsonl", "config.yaml"
WRITING = ".writing-"
TOKEN_ROWS = ("prompt", "response", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values")
"""Arrays of ``rows.npz`` with an entry a token; ``<name>_lengths`` cuts each into rows."""


@dataclass(frozen=True)
class Step:
    """One learning step: what it starts from, and what it gave."""

    iteration: int
    kl_coef: float
    """Weight of the KL penalty in the token rewards."""
    before: Commit
    """The commit that it starts from."""
    metrics: Mapping[str, float]
    """Its metrics, by registered name."""
    warned: bool
    """Whether a guard warned of it."""


@dataclass(frozen=True)
class KeptBatch:
    """A batch read from the run's folder."""

    values: Mapping[str, Any]
    """``batch.json``: iteration, version, kl_coef, metrics, engine, threads, warned."""
    batch: ScoredShard
    """All of its rows, as one shard."""
    groups: Mapping[str, dict[str, bytes]]
    """Learner group -> files of its state before the step."""


class BatchKeeper:
    """Keeps the batches that ``run.keep_batches`` asks for, beside the next iteration."""

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        checkpoints: Checkpoints,
        fetch: Fetch,
        warn: Callable[[int, Alarm], None],
    ) -> None:
        self._config = config
        self._folder = recorder.folder / FOLDER
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._fetch = fetch
        self._warn = warn
        self._writing: asyncio.Task[None] | None = None
        self._next: tuple[Step, Sequence[ScoredShard]] | None = None
        """The batch that waits until the one before it is written."""

    def drop_after(self, iteration: int) -> None:
        """Drop what an earlier process kept of iterations that are run again, or did not finish."""
        for path in self._folder.glob(f"{WRITING}*"):
            shutil.rmtree(path, ignore_errors=True)
        for later in [kept for kept in iterations(self._folder) if kept > iteration]:
            shutil.rmtree(self._folder / str(later), ignore_errors=True)

    async def keep(self, step: Step, batch: Sequence[ScoredShard]) -> None:
        """Keep a batch: with a warning now, else beside what follows.

        A disk that is slower than an iteration doesn't make it slower: of those that wait for it
        the newest is kept.
        """
        choice = self._config.run.keep_batches
        if choice == "none" or (choice == "warned" and not step.warned):
            return
        if step.warned or choice == "all":
            await self.written()
        self._next = (step, batch)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._keep_next())
        if step.warned:
            await self.written()

    async def written(self) -> None:
        """Wait until the batch that is being written, if any, is in the run's folder."""
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def _keep_next(self) -> None:
        while self._next is not None:
            (step, batch), self._next = self._next, None
            await self._keep(step, batch)

    async def _keep(self, step: Step, batch: Sequence[ScoredShard]) -> None:
        temporary = self._folder / f"{WRITING}{step.iteration}"
        with self._recorder.phase("keep", step.iteration):
            try:
                rows = await self._rows(batch)
                await asyncio.to_thread(self._write, temporary, step, rows)
                for name, state in step.before.groups.items():
                    await self._write_state(temporary / name, step.before.version, name, state)
                await asyncio.to_thread(self._finish, temporary, step.iteration)
            except (OSError, RlhfError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                self._warn(step.iteration, _not_kept(error))

    async def _rows(self, batch: Sequence[ScoredShard]) -> "_Rows":
        """Bring a batch to the driver, in prompt order."""

        async def column(handles: Sequence[Handle[Any] | None]) -> list[Any]:
            parts = [await self._fetch(handle) for handle in handles if handle is not None]
            return list(chain.from_iterable(parts))

        rollouts: list[Rollout] = await column([scored.shard.rollouts for scored in batch])
        return _Rows(
            rollouts=rollouts,
            columns={
                "prompt": [np.array(r.prompt.token_ids, dtype=np.int64) for r in rollouts],
                "response": [rollout.response_ids for rollout in rollouts],
                "rollout_logprobs": [rollout.rollout_logprobs for rollout in rollouts],
                "old_logprobs": await column([scored.old_logprobs for scored in batch]),
                "ref_logprobs": await column([scored.ref_logprobs for scored in batch]),
                "values": await column([scored.values for scored in batch]),
            },
            scores=[score for scored in batch for score in scored.scores],
        )

    def _write(self, folder: Path, step: Step, rows: "_Rows") -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        values = {
            "iteration": step.iteration,
            "version": step.before.version,
            "warned": step.warned,
            "kl_coef": step.kl_coef,
            "metrics": dict(step.metrics),
            "groups": list(step.before.groups),
            "engine": "deepspeed" if self._config.cluster.runs_on_ray else "torch",
            "threads": torch.get_num_threads(),
            "progress": dict(step.before.progress),
        }
        (folder / BATCH).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG).write_text(dump(self._config), encoding="utf-8")
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            for line in rows.texts():
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        np.savez(folder / ROWS, allow_pickle=False, **rows.arrays())

    async def _write_state(
        self, folder: Path, version: int, name: str, state: Handle[Mapping[str, bytes]]
    ) -> None:
        """Link a group's state to the saved commit's files, which costs nothing; else write it."""
        if await asyncio.to_thread(self._checkpoints.link, version, name, folder):
            return
        files = await self._fetch(state)

        def write() -> None:
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_bytes(content)

        await asyncio.to_thread(write)

    def _finish(self, temporary: Path, iteration: int) -> None:
        target = self._folder / str(iteration)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        if self._config.run.keep_batches == "all":
            return
        kept = iterations(self._folder)
        warned = [number for number in kept if _is_warned(self._folder / str(number))]
        for number in {*kept} - {iteration, *warned[-MOST_WARNED:]}:
            shutil.rmtree(self._folder / str(number), ignore_errors=True)


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch, in prompt order."""

    rollouts: Sequence[Rollout]
    columns: Mapping[str, Sequence[np.ndarray]]
    """For each of `TOKEN_ROWS` a row a rollout; values are none without a critic."""
    scores: Sequence[float]

    def texts(self) -> list[dict[str, object]]:
        return [
            {
                "position": rollout.position,
                "prompt_id": rollout.prompt.id,
                "prompt": rollout.prompt.text,
                "response": rollout.text,
                "score": score,
                "finish_reason": rollout.finish_reason,
            }
            for rollout, score in zip(self.rollouts, self.scores, strict=True)
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        held = {name: rows for name, rows in self.columns.items() if rows}
        return {
            **{name: np.concatenate(rows) for name, rows in held.items()},
            **{f"{name}_lengths": np.array([*map(len, rows)]) for name, rows in held.items()},
            "scores": np.array(self.scores, dtype=np.float64),
        }


def iterations(folder: Path) -> list[int]:
    """Return the iterations whose batches a folder keeps, in order."""
    names = [path.parent.name for path in folder.glob(f"*/{BATCH}")]
    return sorted(int(name) for name in names if name.isdigit())


def _is_warned(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / BATCH).read_text(encoding="utf-8"))["warned"])
    except (*DAMAGE, OSError):
        return False


def read(stage: Path, iteration: int) -> KeptBatch:
    """Return a kept batch.

    Args:
        stage: folder of the stage ppo.
        iteration: whose batch.

    Raises:
        DataError: it is damaged.
    """
    folder = stage / FOLDER / str(iteration)
    try:
        values = json.loads((folder / BATCH).read_text(encoding="utf-8"))
        groups = {
            name: {path.name: path.read_bytes() for path in (folder / name).iterdir()}
            for name in values["groups"]
        }
        texts = (folder / SAMPLES).read_text(encoding="utf-8").splitlines()
        with np.load(folder / ROWS) as arrays:
            batch = _scored(arrays, [json.loads(line) for line in texts], values["version"])
    except (*DAMAGE, OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{folder} is damaged ({error}); name another iteration: {iterations(folder.parent)}"
        ) from error
    return KeptBatch(values, batch, groups)


def _scored(
    arrays: Mapping[str, np.ndarray], texts: Sequence[Mapping[str, Any]], version: int
) -> ScoredShard:
    """Make one shard of the rows and texts of a batch."""
    columns = {
        name: np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"])[:-1])
        for name in TOKEN_ROWS
        if name in arrays
    }
    rollouts = [
        Rollout(
            position=text["position"],
            prompt=Prompt(text["prompt_id"], text["prompt"], tuple(prompt.tolist())),
            response_ids=response,
            rollout_logprobs=logprobs,
            finish_reason=text["finish_reason"],
            version=version,
            text=text["response"],
        )
        for text, prompt, response, logprobs in zip(
            texts, columns["prompt"], columns["response"], columns["rollout_logprobs"], strict=True
        )
    ]
    info = ShardInfo(
        index=0,
        positions=tuple(rollout.position for rollout in rollouts),
        response_lengths=tuple(len(rollout.response_ids) for rollout in rollouts),
        stopped=tuple(rollout.finish_reason == "stop" for rollout in rollouts),
        versions=(version,) * len(rollouts),
    )
    return ScoredShard(
        shard=Shard(info, cast("Handle[list[Rollout]]", rollouts)),
        raw_scores={},
        old_logprobs=cast("Handle[TokenRows]", columns["old_logprobs"]),
        ref_logprobs=cast("Handle[TokenRows]", columns["ref_logprobs"]),
        values=cast("Handle[TokenRows] | None", columns.get("values")),
        mismatch=Mismatch(math.nan, math.nan, len(arrays["old_logprobs"])),
        scores=tuple(arrays["scores"].tolist()),
    )


def _not_kept(error: Exception) -> Alarm:
    return Alarm(
        "keep_batches",
        "skip",
        {},
        f"The batch could not be kept for a replay (run.keep_batches): {error}",
    )
