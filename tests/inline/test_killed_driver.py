"""A driver that is killed anywhere resumes as if it had not been: the same metrics and weights."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import vowels
from kill_at_phase import EDGES, PHASES
from killed_runs import Death, drive

from rlhf_ray.config import Config, dump, resolve
from rlhf_ray.runs.control import ControlFiles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["killed_runs", "rlhf_ray.stages.ppo.stage", "transformers"])
DEATHS = [
    (edge, phase, iteration)
    for iteration, (phase, edge) in enumerate(
        ((phase, edge) for phase in PHASES for edge in EDGES), start=1
    )
]
"""One death at each edge of each phase, each in an iteration of its own."""
ITERATIONS = len(DEATHS) + 1
RANDOM_DEATHS = 20
VARIES = ("timing_s/", "throughput/", "generators/", "cost/")
"""Metrics that are of the clock."""
TIMES = ("useful_s", "committed_at")
"""What a commit holds of the clock."""


def make_config(folder: Path, model: str) -> Config:
    """A run whose state has all its parts: critic, adaptive KL, running moments, best score."""
    config = vowels.make_config(
        folder,
        model,
        rollout={"max_tokens": 6, "shard_size": 4},
        ppo={"iterations": ITERATIONS, "epochs": 1, "eval_every": 1, "kl_target": 0.5},
    )
    values = config.model_dump()
    values["rewards"][0] |= {"in_process": True, "scale": "running"}
    return resolve(values)


class Moment(NamedTuple):
    """When to kill a process."""

    in_phases: bool
    """Counted from the first phase that it enters, not from its start."""
    after_s: float


class Run:
    """A run in a folder, driven by one process after the other."""

    def __init__(self, folder: Path, model: str) -> None:
        folder.mkdir()
        self.config = make_config(folder, model)
        self.folder = Path(self.config.run.dir)
        self.log = folder / "log.txt"

    def drive(self, death: Death | None = None, kill: Moment | None = None) -> bool:
        """Run to the end or to a death; returns whether it died."""
        reader, writer = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=drive, args=(self.config, death, writer, self.log))
        process.start()
        writer.close()  # so that the reader sees the end of a process that does not reach a phase
        if kill is not None:
            if kill.in_phases:
                reader.poll(60)
            process.join(kill.after_s)
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()
        return process.exitcode != 0

    def records(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "ppo" / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [{k: v for k, v in each.items() if not k.startswith(VARIES)} for each in found]

    def states(self) -> dict[str, Any]:
        """What each commit holds besides its files: counts, cursor, moments, and digests."""
        states = {}
        for path in sorted((self.folder / "checkpoints").glob("[0-9]*/state.json")):
            state = states[path.parent.name] = json.loads(path.read_text())
            for name in TIMES:
                del state["progress"][name]
        return states

    def outcome(self) -> dict[str, Any]:
        """All that must not depend on deaths: records, counts, and every byte of the commits."""
        checkpoints = self.folder / "checkpoints"
        files = {
            str(path.relative_to(checkpoints)): path.read_bytes()
            for path in sorted(checkpoints.rglob("*"))
            if path.is_file() and path.name != "state.json"
        }
        names = ("metrics", "completions", "eval", "warnings")
        return {
            **{name: self.records(name) for name in names},
            "best": (checkpoints / "best").resolve().name,
            "states": self.states(),
            "files": files,
        }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str) -> Run:
    """A run that nothing disturbed."""
    run = Run(tmp_path_factory.mktemp("runs") / "whole", model)
    assert not run.drive()
    assert len(run.records("metrics")) == ITERATIONS
    assert len(run.states()) >= 3
    return run


def test_a_driver_killed_at_the_edges_of_every_phase_repeats_nothing_and_loses_nothing(
    whole: Run, tmp_path: Path, model: str
) -> None:
    run, expected = Run(tmp_path / "killed", model), whole.records("metrics")
    for death in DEATHS:
        assert run.drive(death), f"it did not reach {death}"
        found = run.records("metrics")
        # At most the commit before this one's was still being written.
        assert len(found) >= death[2] - 2, death
        assert found == expected[: len(found)], f"after its death {death}"
    assert not run.drive()
    assert run.outcome() == whole.outcome()


def test_a_driver_killed_at_twenty_random_times_resumes_as_if_it_had_not_been(
    whole: Run, tmp_path: Path, model: str
) -> None:
    chance, run = random.Random(13), Run(tmp_path / "0", model)
    for number in range(RANDOM_DEATHS):
        # One in four as it starts, which takes as long as several iterations.
        moment = Moment(bool(number % 4), chance.uniform(0.0, 0.4 if number % 4 else 0.8))
        if not run.drive(kill=moment):  # it had ended
            assert run.outcome() == whole.outcome()
            run = Run(tmp_path / str(number + 1), model)
            assert run.drive(kill=Moment(False, 0.5))
    assert not run.drive()
    assert run.outcome() == whole.outcome()


def test_a_killed_driver_is_started_again_by_the_run_itself(tmp_path: Path, model: str) -> None:
    run = Run(tmp_path / "killed", model)
    config = tmp_path / "config.yaml"
    config.write_text(dump(run.config), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "rlhf_ray", "run", str(config), "--retries", "1"]
    with run.log.open("w") as log:
        parent = subprocess.Popen(command, stdout=log, stderr=log)
        while not (run.folder / "checkpoints" / "2" / "state.json").is_file():
            assert parent.poll() is None, run.log.read_text()
            time.sleep(0.01)
        driver = ControlFiles(run.folder).driver()["pid"]
        assert driver != parent.pid
        os.kill(driver, signal.SIGKILL)
        assert parent.wait(120) == 0, run.log.read_text()
    assert "The driver died (exit code 137). It is started again in 5 s" in run.log.read_text()
    assert len(run.records("metrics")) == ITERATIONS
    summary = json.loads((run.folder / "ppo" / "summary.json").read_text())
    assert summary["restarts"]["driver"] == 1
    assert (summary["samples_learnt"], summary["iterations"]) == (8 * ITERATIONS, ITERATIONS)
