"""The launchers of scripts/cluster, each by its schema or by a run with stand-ins."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import with_head_node_ip

from rlhf_ray.config import load
from rlhf_ray.placement.layout import Node, demands, lay_out

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "cluster"
KUBERAY = ("raycluster.yaml", "rayjob.yaml")
KUBECTL = shutil.which("kubectl")


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def test_the_ray_cluster_is_valid_by_rays_own_schema() -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(read("ray_cluster.yaml"), json.loads(schema.read_text()))


def start(role: str, address: str, home: Path) -> str:
    """Start a machine as `ray up` does: each command in a shell of its own, with what Ray exports.

    Returns:
        What its `ray` was called with, line by line.
    """
    cluster = read("ray_cluster.yaml")
    commands: list[str] = cluster[f"{role}_start_ray_commands"]
    if role == "worker":
        commands = with_head_node_ip(commands, cluster["provider"]["head_ip"])
    installed = home / "rlhf-ray" / ".venv" / "bin"
    installed.mkdir(parents=True, exist_ok=True)
    stand_ins = {"ray": 'echo "$RAY_AUTH_MODE: $*"', "ip": f'echo "inet {address}/24"'}
    for name, body in stand_ins.items():
        (installed / name).write_text(f"#!/bin/sh\n{body}\n")
        (installed / name).chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home)}
    return "".join(
        subprocess.run(
            ["bash", "-c", command], env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        for command in commands
    )


def test_the_ray_clusters_nodes_hold_the_job_that_is_made_for_them(tmp_path: Path) -> None:
    """Nodes as they would be started, with their labels, laid out for three nodes of eight."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    provider = read("ray_cluster.yaml")["provider"]
    head, *workers = [
        start("head", provider["head_ip"], tmp_path),
        *(start("worker", address, tmp_path) for address in provider["worker_ips"]),
    ]
    assert head == (
        "token: stop\n"
        f"token: start --head --port=6379 --node-ip-address={provider['head_ip']} "
        "--dashboard-host=127.0.0.1 --labels role=train "
        "--autoscaling-config=~/ray_bootstrap_config.yaml\n"
    )
    assert workers == [
        f"token: stop\ntoken: start --address={provider['head_ip']}:6379 --labels role={role}\n"
        for role in ("train", "rollout")
    ]
    labels = [said.partition("role=")[2].split()[0] for said in (head, *workers)]
    config = load(ROOT / "configs" / "stackllama" / "ppo_3x8_a100.yaml")
    nodes = [Node(str(i), 8, {"role": label}) for i, label in enumerate(labels)]
    places = lay_out(demands(config), nodes)
    assert len({(place.node, *place.gpus) for place in places}) == 24


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_ray_cluster_does_not_start_without_a_token(role: str, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        start(role, "10.0.0.2", tmp_path)
    assert caught.value.stdout == "no token in ~/.ray/auth_token\n"


def kuberay_schema() -> Any:
    return json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_objects_are_valid(name: str) -> None:
    schema, found = kuberay_schema(), read(name)
    jsonschema.validate(found, schema)
    for right, wrong in (
        ('"groupName"', '"name"'),
        ('"rayStartParams": {}', '"rayStartParams": {"labels": "role=train"}'),
    ):
        text = json.dumps(found)
        assert right in text
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(text.replace(right, wrong)), schema)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_groups_have_roles_a_token_and_secrets_of_their_own(name: str) -> None:
    spec = read(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["authOptions"] == {"mode": "token"}
    labels = {group["groupName"]: group["labels"] for group in cluster["workerGroupSpecs"]}
    assert labels == {"train": {"role": "train"}, "rollout": {"role": "rollout"}}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        is_head = group is cluster["headGroupSpec"]  # its autoscaler asks the API for pods
        assert pod.get("automountServiceAccountToken", True) is is_head
        (container,) = pod["containers"]
        assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", container["image"])
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        _, _, drain = container["lifecycle"]["preStop"]["exec"]["command"]
        left_s = int(re.findall(r"--deadline-remaining-seconds (\d+)", drain)[0])
        assert 120 < left_s < pod["terminationGracePeriodSeconds"]
        assert container["envFrom"] == [{"secretRef": {"name": "rlhf-ray-secrets"}}]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def redis() -> tuple[Any, Any, Any]:
    """Service, set of pods and network policy of the Redis that keeps a cluster's state."""
    service, pods, policy = yaml.safe_load_all((FOLDER / "redis.yaml").read_text())
    return service, pods, policy


def with_redis() -> Any:
    """The cluster that stays, as the kustomization makes it."""
    kustomization = read("kustomization.yaml")
    assert kustomization["resources"] == ["raycluster.yaml", "redis.yaml"]
    (patch,) = kustomization["patches"]
    (change,) = yaml.safe_load(patch["patch"])
    assert (change["op"], patch["target"]) == ("add", {"kind": "RayCluster"})
    *_, section, key = change["path"].split("/")
    cluster = read("raycluster.yaml")
    cluster[section][key] = change["value"]
    return cluster


def test_a_cluster_keeps_its_state_in_its_redis() -> None:
    cluster, (service, pods, policy) = with_redis(), redis()
    jsonschema.validate(cluster, kuberay_schema())
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    (port,) = service["spec"]["ports"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port['port']}"
    template = pods["spec"]["template"]
    (container,) = template["spec"]["containers"]
    (password,) = container["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
    own = service["spec"]["selector"]
    assert template["metadata"]["labels"] == own == pods["spec"]["selector"]["matchLabels"]
    assert policy["spec"]["podSelector"] == {"matchLabels": own}
    (among,) = policy["spec"]["ingress"]
    assert among["from"] == read("networkpolicy.yaml")["spec"]["ingress"][0]["from"]
    assert among["ports"] == [{"protocol": "TCP", "port": port["port"]}]
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", container["image"])


def test_the_password_of_the_redis_is_in_no_list_of_processes(tmp_path: Path) -> None:
    (tmp_path / "redis-server").write_text('#!/bin/sh\necho "$*"\ncat\n')
    (tmp_path / "redis-server").chmod(0o755)
    (container,) = redis()[1]["spec"]["template"]["spec"]["containers"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PASSWORD": "hidden"}
    started = subprocess.run(
        container["command"], env=environment, capture_output=True, text=True, check=True
    )
    arguments, *settings = started.stdout.splitlines()
    assert arguments == "- --appendonly yes --dir /data"
    assert settings == ["requirepass hidden"]


@pytest.mark.skipif(KUBECTL is None, reason="needs kubectl")
def test_kubectl_reads_the_manifests_as_these_tests_do() -> None:
    command = [str(KUBECTL), "kustomize", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert by_name(yaml.safe_load_all(done.stdout)) == by_name([with_redis(), *redis()])


@pytest.mark.skipif(KUBECTL is None, reason="needs kubectl")
def test_each_step_of_the_recipe_is_a_kubernetes_job_with_the_nodes_that_it_needs(
    tmp_path: Path,
) -> None:
    """The page's commands, by a `kubectl` that keeps what would be created."""
    page = (ROOT / "docs" / "stackllama.md").read_text(encoding="utf-8")
    block = page.partition("## On Kubernetes")[2].partition("```bash\n")[2].partition("```")[0]
    kept = 'f=$3; [ "$f" = - ] && f=/dev/stdin; cat "$f" >>"$KEPT"; echo --- >>"$KEPT"'
    (tmp_path / "kubectl").write_text(
        f'#!/bin/bash\nif [[ $1 == create ]]; then {kept}; else exec {KUBECTL} "$@"; fi\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["KEPT"] = str(tmp_path / "kept")
    subprocess.run(["bash", "-eu", "-c", block], env=environment, cwd=ROOT, check=True)
    jobs = [job for job in yaml.safe_load_all((tmp_path / "kept").read_text()) if job]
    nodes = []
    for job in jobs:
        jsonschema.validate(job, kuberay_schema())
        groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        nodes.append([(g["minReplicas"], g["replicas"], g["maxReplicas"]) for g in groups])
    assert nodes == [[(0, 0, 0)], [(1, 1, 1)], [(1, 1, 1)], [(2, 2, 2), (1, 1, 4)]]
    entrypoints = [job["spec"]["entrypoint"] for job in jobs]
    assert entrypoints[1] == (
        "rlhf-ray run configs/stackllama/sft.yaml run.dir=/shared/runs/stackllama "
        "model.path=/shared/models/llama-7b"
    )
    assert entrypoints[3] in page


def by_name(objects: Iterable[Any]) -> dict[tuple[str, str], Any]:
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def test_pods_of_a_cluster_let_in_each_other_and_at_the_dashboard_submitters() -> None:
    policy = read("networkpolicy.yaml")
    assert policy["kind"] == "NetworkPolicy"
    spec = policy["spec"]
    own = {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]}
    assert spec["podSelector"] == own
    assert spec["policyTypes"] == ["Ingress"]
    among, submitters, scraper = spec["ingress"]
    assert among == {"from": [{"podSelector": own}]}
    assert submitters["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert scraper["ports"] == [{"protocol": "TCP", "port": 8080}]


@pytest.mark.parametrize("name", ["cpu", "gpu", "gpu_cu12"])
def test_every_package_of_a_lock_has_a_hash(name: str) -> None:
    text = (ROOT / f"scripts/requirements/{name}.txt").read_text(encoding="utf-8")
    packages = re.findall(r"^[\w.-]+==\S+.*(?:\n +--hash\S+.*)*", text, re.MULTILINE)
    assert len(packages) > 100
    assert not [package for package in packages if "--hash=sha256:" not in package]


def test_the_image_is_locked_and_runs_without_root() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n|\\\n", "", text, flags=re.MULTILINE).splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert re.search(r":\d\S*@sha256:[0-9a-f]{64}$", base)
    assert ":latest" not in base
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["ubuntu"]
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line
            assert all(f"!{source}" in kept for source in sources), line
    installs = [line for line in lines if "pip install" in line]
    assert all("--no-deps" in part for line in installs for part in line.split("pip install")[1:])
    assert re.search(
        r"^deepspeed==", (ROOT / "scripts/requirements/gpu.txt").read_text(), re.MULTILINE
    )
    assert any("DS_BUILD_FUSED_ADAM=1" in line for line in installs)
    # What is built beforehand runs on GPUs to come by its PTX alone.
    assert re.search(r'TORCH_CUDA_ARCH_LIST="8\.0;.*\+PTX"', text)


STAND_INS = {
    "scontrol": 'printf "%s\\n" n1 n2 n3',
    "srun": "while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || node=${1#*=}; shift; done\n"
    'if [[ $1 == bash ]]; then echo "10.0.0.${node#n}"; exit; fi\n'
    'echo "$node $* token=$(wc -c <"$RAY_AUTH_TOKEN_PATH")" >>"$LOG"\n'
    "exec sleep 60",
    # All nodes on one line, as Ray prints them.
    "ray": "echo [$(grep ' ray start' \"$LOG\" | sed 's/.*/{\"node_id\": 1},/')]",
    "rlhf-ray": 'echo "run $* at $RAY_ADDRESS"; stat -c %a "$RAY_AUTH_TOKEN_PATH"',
}


def slurm_job(
    tmp_path: Path,
    arguments: Sequence[str] = ("run", "c.yaml", "run.dir=/shared/r"),
    variables: Mapping[str, str] = MappingProxyType({}),
    **stand_ins: str,
) -> "subprocess.Popen[str]":
    for name, body in {**STAND_INS, **stand_ins}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    return subprocess.Popen(
        [FOLDER / "slurm.sh", *arguments],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "VENV": str(tmp_path / "venv"),
            "LOG": str(log),
            "RAY_WAIT_S": "0.05",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_slurm_script_starts_a_labelled_cluster_with_a_token(tmp_path: Path) -> None:
    job = slurm_job(tmp_path)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    started, (ran, mode) = (tmp_path / "log").read_text().splitlines(), out.splitlines()
    assert sorted(started) == [
        "n1 ray start --block --head --node-ip-address=10.0.0.1 --port=6379 "
        "--dashboard-host=127.0.0.1 --labels role=train token=64",
        "n2 ray start --block --address=10.0.0.1:6379 --node-ip-address=10.0.0.2 "
        "--labels role=train token=64",
        "n3 ray start --block --address=10.0.0.1:6379 --node-ip-address=10.0.0.3 "
        "--labels role=rollout token=64",
    ]
    assert ran == "run run c.yaml run.dir=/shared/r cluster.mode=ray at 10.0.0.1:6379"
    assert mode == "600"
    assert not list(tmp_path.glob(".ray-token*"))


@pytest.mark.parametrize(("code", "queued"), [(143, True), (0, False), (1, False)])
def test_a_slurm_job_whose_time_is_up_is_queued_again_unless_its_run_ended(
    tmp_path: Path, code: int, *, queued: bool
) -> None:
    log = "LOG"
    job = slurm_job(
        tmp_path,
        **{
            "rlhf-ray": f"trap 'sleep .2; exit {code}' TERM; echo up; while :; do sleep .05; done",
            "scontrol": f'[[ $1 != requeue ]] || echo "$*" >>"${log}"; printf "%s\\n" n1 n2 n3',
        },
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == code
    assert ("requeue 7" in (tmp_path / "log").read_text().splitlines()) is queued


def test_the_slurm_jobs_of_the_recipe_wait_for_what_they_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "stackllama.md").read_text(encoding="utf-8")
    block = page.partition("## On a Slurm cluster")[2].partition("```bash\n")[2].partition("```")[0]
    log, sbatch = tmp_path / "log", tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$*" >>{log}\nwc -l <{log}\n')
    sbatch.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", "-eu", "-c", block], env={"PATH": path}, cwd=ROOT, check=True)
    jobs = log.read_text().splitlines()
    configs = [re.findall(r"configs/stackllama/(\w+)\.yaml", job)[0] for job in jobs]
    assert configs == ["prepare", "sft", "reward", "ppo_3x8_a100"]
    after = [re.findall(r"--dependency=(\S+)", job) for job in jobs]
    assert after == [[], ["afterok:1"], ["afterok:1"], ["afterok:2:3"]]
    for job in jobs:
        assert "--parsable --kill-on-invalid-dep=yes" in job
        script = next(word for word in job.split() if word.endswith(".sh"))
        assert os.access(ROOT / script, os.X_OK)


def test_each_task_of_a_slurm_array_has_a_seed_and_a_folder_of_its_own(tmp_path: Path) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"`sbatch --array=.*slurm\.sh (run .*)`", page)
    job = slurm_job(tmp_path, arguments.split(), {"SLURM_ARRAY_TASK_ID": "2"})
    out, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    assert out.startswith("run run CONFIG run.seed=2 run.dir=/shared/runs/seed-2 cluster.mode=ray")
