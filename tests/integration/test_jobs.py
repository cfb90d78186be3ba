"""Runs as jobs of a real job server: submitted, watched and stopped by its address alone."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_cluster import JobCluster, job_cluster

from rlhf_ray.runs.control import ControlFiles, RunStatus

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(590)]

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ITERATIONS = 400
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
    with job_cluster(folder) as started:
        yield started


def status_of(cluster: JobCluster, run: str) -> dict[str, Any]:
    """Return a run's status as another process reads it, from the dashboard's address alone."""
    return json.loads(cluster.rlhf_ray("status", run, "--json"))


def wait_until(cluster: JobCluster, folder: Path, holds: Callable[[RunStatus], bool]) -> None:
    """Looks into the run's folder: asking the cluster all the time would slow the run."""
    deadline = time.monotonic() + 240
    files = ControlFiles(folder)
    while not ((folder / "status.json").is_file() and holds(files.status())):
        if time.monotonic() > deadline:
            pytest.fail(cluster.run("rlhf-ray", "logs", str(folder)).output)
        time.sleep(0.2)


def has_begun(status: RunStatus) -> bool:
    return status.progress is not None and not status.progress.startswith("0/")


def living_actors(cluster: JobCluster) -> list[tuple[str, str]]:
    """Namespace and name of each."""
    command = ("list", "actors", "--filter", "state=ALIVE", "--format", "json")
    listed = cluster.run("ray", *command)
    assert listed.code == 0, listed.output
    _, bracket, rows = listed.output.partition("[")  # nothing at all where there are none
    found = json.loads(bracket + rows or "[]")
    actors = [(actor["ray_namespace"], actor["name"]) for actor in found]
    return [actor for actor in actors if actor[0].startswith("rlhf_ray-")]


def test_ppo_runs_as_a_job_is_stopped_and_goes_on_to_its_end(
    cluster: JobCluster, tmp_path: Path, llama: str, reward_model: str, prompts_file: Path
) -> None:
    run = tmp_path / "run"
    arguments = (
        *("--no-rehearse", "ppo.yaml", "run.name=first", f"run.dir={run}", "run.stages=[ppo]"),
        *(f"model.path={llama}", f"reward.path={reward_model}"),
        f"data.prompts.path={prompts_file}",
    )
    assert "Submitted first-" in cluster.rlhf_ray("submit", *arguments)
    wait_until(cluster, run, lambda status: bool(status.iteration))
    running = status_of(cluster, "first")
    assert (running["stage"], running["state"]) == ("ppo", "running")
    assert running["iterations"] == ITERATIONS
    assert running["version"] == running["iteration"] > 0
    assert {"reward", "kl", "seconds_per_iteration", "eta_s"} <= running.keys()
    (generator,) = running["generators"]
    assert generator["name"] == "generator-0"
    assert generator["restarts"] == 0
    assert ("rlhf_ray-first", "policy-0") in living_actors(cluster)

    cluster.rlhf_ray("scale", "first", "--generators", "2")
    wait_until(cluster, run, lambda s: [g.state for g in s.generators] == ["ready"] * 2)
    generators = {("rlhf_ray-first", f"generator-{index}") for index in range(2)}
    assert generators <= set(living_actors(cluster))

    again = cluster.run("rlhf-ray", "submit", *arguments)
    assert again.code == 2
    assert "is running already" in again.output

    assert "committed and saved" in cluster.rlhf_ray("stop", str(run))
    summary = json.loads((run / "ppo" / "summary.json").read_text(encoding="utf-8"))
    stopped_at = summary["iterations"]
    assert summary["stopped"]
    assert 0 < stopped_at < ITERATIONS
    assert (run / "checkpoints" / "latest").resolve().name == str(stopped_at)
    assert living_actors(cluster) == []
    assert status_of(cluster, "first")["state"] == "stopped"
    (job,) = json.loads(cluster.rlhf_ray("list", "--json"))
    assert (job["name"], job["status"], job["exit_code"]) == ("first", "SUCCEEDED", 0)

    last = stopped_at + 2
    followed = cluster.rlhf_ray("submit", *arguments, f"ppo.iterations={last}", "--follow")
    assert f"ppo done: {last}/{last} iterations" in followed
    lines = (run / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, last + 1))
    finished = status_of(cluster, "first")
    assert (finished["state"], finished["iteration"]) == ("finished", last)
    assert living_actors(cluster) == []


def test_two_runs_at_once_one_of_them_by_rays_own_command(
    cluster: JobCluster, tmp_path: Path, llama: str, reward_model: str, prompts_file: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    keys = (
        *("run.stages=[ppo]", f"model.path={llama}", f"reward.path={reward_model}"),
        *(f"data.prompts.path={prompts_file}", "rollout.engine=transformers"),
        # Three actors a run, as both have eight CPUs together.
        *("ppo.advantage=rloo", "ppo.samples_per_prompt=2", "reference.kind=policy_base"),
    )
    plain = ("ray", "job", "submit", "--working-dir", ".", "--submission-id", "plain", "--")
    by_ray = cluster.start(*plain, "rlhf-ray", "run", "ppo.yaml", f"run.dir={one}", *keys)
    ours = ("rlhf-ray", "submit", "--no-rehearse", "ppo.yaml", "run.name=two", f"run.dir={two}")
    by_us = cluster.start(*ours, *keys, "--follow")
    for folder in (one, two):
        wait_until(cluster, folder, lambda status: bool(status.iteration))
    policies = [namespace for namespace, name in living_actors(cluster) if name == "policy-0"]
    assert sorted(policies) == ["rlhf_ray-quickstart", "rlhf_ray-two"]
    twin = cluster.run(
        *("ray", "job", "submit", "--working-dir", ".", "--", "rlhf-ray", "run", "ppo.yaml", *keys),
        *("run.name=two", f"run.dir={tmp_path / 'twin'}"),
    )
    assert twin.code != 0
    assert (
        "run.name two is in use on this cluster by the actors generator-0, policy-0, reward-0"
        in twin.output
    )

    for run in ("quickstart", str(one), "plain"):
        assert status_of(cluster, run)["folder"] == str(one)
    listed = {job["id"]: job for job in json.loads(cluster.rlhf_ray("list", "--json"))}
    assert (listed["plain"]["name"], listed["plain"]["folder"]) == ("quickstart", str(one))

    cluster.rlhf_ray("stop", "quickstart")
    left_at = ControlFiles(two).status().iteration or 0
    assert {namespace for namespace, _ in living_actors(cluster)} == {"rlhf_ray-two"}
    wait_until(cluster, two, lambda status: (status.iteration or 0) > left_at)
    cluster.rlhf_ray("stop", "two")
    for process in (by_ray, by_us):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert living_actors(cluster) == []
    for run, folder in (("plain", one), ("two", two)):
        found = status_of(cluster, run)
        assert (found["folder"], found["state"]) == (str(folder), "stopped")


def test_a_supervised_stage_ends_at_once_and_says_what_it_goes_on_from(
    cluster: JobCluster, tmp_path: Path
) -> None:
    keys = ("run.name=third", f"run.dir={tmp_path / 'third'}", "run.stages=[prepare,pretrain]")
    cluster.rlhf_ray("submit", "cheap.yaml", *keys, "pretrain.steps=100000")
    wait_until(cluster, tmp_path / "third", lambda s: s.stage == "pretrain" and has_begun(s))
    assert status_of(cluster, "third")["progress"].endswith("/100000 steps")
    told = cluster.rlhf_ray("stop", "third")
    assert "Stopped in the stage pretrain; it will resume from that stage's last" in told
    deadline = time.monotonic() + 30
    while living_actors(cluster):
        assert time.monotonic() < deadline, living_actors(cluster)
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
