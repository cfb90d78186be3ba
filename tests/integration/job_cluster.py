"""A Ray cluster with a job server, on loopback and with a token, as tests start it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

BINARIES = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    output: str


@dataclass(frozen=True)
class JobCluster:
    """A cluster: its address and its processes."""

    environment: dict[str, str]
    folder: Path
    client: Path = BINARIES
    """Folder of the program ``rlhf-ray`` that users of the cluster have."""

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command as a user of the cluster does, from another working folder."""
        binaries, environment = BINARIES, self.environment
        if arguments[0] == "rlhf-ray" and self.client != BINARIES:
            binaries, environment = self.client, dict(environment)
            del environment["PYTHONPATH"]  # it leads to this checkout
        return subprocess.Popen(
            [str(binaries / arguments[0]), *arguments[1:]],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, timeout_s: float = 200.0) -> Done:
        """Run a command to its end."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=timeout_s)
        return Done(process.returncode, output)

    def rlhf_ray(self, *arguments: str) -> str:
        """Output of ``rlhf-ray ARGUMENTS``; fails where it fails."""
        done = self.run("rlhf-ray", *arguments)
        assert done.code == 0, done.output
        return done.output

    def living_actors(self) -> list[tuple[str, str]]:
        """Namespace and name of each actor of a run, as Ray's dashboard lists them."""
        address = self.environment["RAY_API_SERVER_ADDRESS"]
        alive = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        request = urllib.request.Request(
            f"{address}/api/v0/actors?{alive}",
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        actors = [(actor["ray_namespace"], actor["name"]) for actor in found]
        return [actor for actor in actors if (actor[0] or "").startswith("rlhf_ray-")]


def free_port() -> int:
    """A port above those that Ray gives to its workers."""
    for port in range(25000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("no free port")


@contextmanager
def job_cluster(
    folder: Path, *options: str, port: int = 0, client: Path = BINARIES, **variables: str
) -> Iterator[JobCluster]:
    """Start one node that declares eight CPUs; at the end, end everything that it started.

    Args:
        folder: working folder of those who use it.
        options: further ones of ``ray start``.
        port: of its head; 0: any.
        client: see `JobCluster`.
        variables: further ones of the environment of its processes.
    """
    dashboard, agent = free_port(), free_port() + 1
    mark = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="jobs-", dir="/tmp") as temporary:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": temporary,
            "JOB_CLUSTER": mark,
            **variables,
        }
        command = [
            *(str(BINARIES / "ray"), "start", "--head", "--node-ip-address=127.0.0.2"),
            *(f"--port={port}", "--num-cpus=8", f"--temp-dir={temporary}/ray"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", "--object-store-memory=300000000"),
            *("--disable-usage-stats", *options),
        ]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            user = environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            yield JobCluster(user, folder, client)
        finally:
            _end(f"JOB_CLUSTER={mark}".encode())


def _end(mark: bytes) -> None:
    deadline = time.monotonic() + 20
    while (left := [process for process in psutil.process_iter() if _has(process, mark)]) and (
        time.monotonic() < deadline
    ):
        for process in left:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=2)


def _has(process: psutil.Process, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
