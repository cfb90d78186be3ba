"""A run's metrics in Ray, as Prometheus and people see them during the run."""

import json
import math
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from rlhf_ray.cluster.workers import LOOPBACK
from rlhf_ray.disk import private_name
from rlhf_ray.observability.dashboards.files import write
from rlhf_ray.observability.dashboards.prometheus import Bounds
from rlhf_ray.observability.metrics import METRICS, registered_as
from rlhf_ray.observability.series import exported

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

CONFIG = """
run: {name: watched, stages: [ppo]}
cluster: {gpu_hour_price: 2.0}
model: {max_length: 96}
lora: {r: 8}
ppo: {iterations: 10000, batch_size: 8, mini_batch_size: 4, save_every: 5, eval_every: 5}
rollout: {engine: transformers, max_prompt_tokens: 64, max_tokens: 16, shard_size: 4}
rewards: [{type: function, function: REWARDS:warn_of_length}]
"""
REWARDS = """
import sys

def warn_of_length(completions, **_):
    print("a line of no interest", file=sys.stderr)
    print("WARNING: planted", file=sys.stderr, flush=True)
    return [float(len(text)) for text in completions]
"""
PROMETHEUS = shutil.which("prometheus")


@dataclass(frozen=True)
class Watched:
    """A PPO run that goes on for as long as tests look at it."""

    command_line: "CommandLine"
    folder: Path
    ray_folder: Path
    """Ray's temporary folder, in which no other cluster's ports are listed."""

    def records(self) -> list[dict[str, Any]]:
        """Metrics of its iterations so far."""
        path = self.folder / "ppo" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def watched(
    new_command_line: Callable[[Path, Path], "CommandLine"],
    tmp_path_factory: pytest.TempPathFactory,
    llama: str,
    prompts_file: Path,
) -> Iterator[Watched]:
    scratch = tmp_path_factory.mktemp("watched")
    with (
        tempfile.TemporaryDirectory(prefix="rlhf-", dir="/tmp") as temporary,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("RAY_TMPDIR", temporary)
        environment.setenv("RAY_metrics_report_interval_ms", "1000")
        environment.setenv("FORCE_COLOR", "1")
        run = Watched(
            new_command_line(scratch, Path(temporary)),
            scratch / "run",
            Path(temporary) / private_name() / "ray",
        )
        try:
            _start(run, scratch, llama, prompts_file)
            yield run
        finally:
            run.command_line.end()


def _start(run: Watched, scratch: Path, llama: str, prompts_file: Path) -> None:
    config, rewards = scratch / "config.yaml", scratch / "rewards.py"
    rewards.write_text(REWARDS, encoding="utf-8")
    config.write_text(CONFIG.replace("REWARDS", str(rewards)), encoding="utf-8")
    keys = (f"run.dir={run.folder}", f"model.path={llama}", f"data.prompts.path={prompts_file}")
    process = run.command_line.start("run", str(config), *keys)

    def iterates() -> bool:
        assert process.poll() is None, f"the run ended:\n{run.command_line.output()}"
        return len(run.records()) >= 6

    wait_until(iterates, "six iterations", 120)


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"no {what} after {timeout_s:g} s"
        time.sleep(0.2)


def exposed(ray_folder: Path) -> dict[str, dict[str, float]]:
    """Value by name and labels of our series on the metrics ports of all nodes."""
    discovery = json.loads((ray_folder / "prom_metrics_service_discovery.json").read_text())
    found: dict[str, dict[str, float]] = {}
    for target in (target for group in discovery for target in group["targets"]):
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        for name, labels, value in re.findall(r"^(ray_rlhf_ray_\w+)\{(.*)\} (\S+)$", text, re.M):
            found.setdefault(name, {})[labels] = float(value)
    return found


def titles(command_line: "CommandLine") -> set[str]:
    """Titles of the run's processes."""
    found = set()
    for process in command_line.processes():
        try:
            found.add(" ".join(process.cmdline()).strip())
        except psutil.Error:
            continue
    return found


def test_the_metrics_port_of_the_head_has_every_metric_and_titles_tell_what_actors_do(
    watched: Watched,
) -> None:
    record = watched.records()[-1]
    logged = {exported(registered_as(name) or name) for name in record if name != "iteration"}
    live = {exported(name) for name in ("commit/time", "disk/free", "actors/busy/<actor>")}
    wait_until(
        lambda: logged | live <= exposed(watched.ray_folder).keys(),
        "series of every logged metric",
        30,
    )
    found = exposed(watched.ray_folder)
    assert logged >= {exported(name) for name in ("rollout/staleness", "cost/per_1000_samples")}
    for series in found.values():
        for labels in series:
            assert 'run="watched"' in labels
            assert re.search(r'role="(driver|generator|policy|critic|reference|reward)"', labels)
            assert 'rank="0"' in labels
    (committed_at,) = found[exported("commit/time")].values()
    assert 0 < time.time() - committed_at < 30
    busy = found[exported("actors/busy/<actor>")]
    roles = {match[1] for labels in busy if (match := re.search(r'role="(\w+)"', labels))}
    assert roles == {"generator", "policy", "critic", "reference", "reward"}
    assert all(0 <= share <= 1 for share in busy.values())
    assert max(busy.values()) > 0.1

    seen: set[str] = set()

    def acted() -> bool:
        seen.update(titles(watched.command_line))
        return bool(
            any(re.fullmatch(r"ray::policy-0 v\d+ learning", title) for title in seen)
            and any(re.fullmatch(r"ray::generator-0 v\d+ generating", title) for title in seen)
        )

    wait_until(acted, "titles of work", 30)


def test_the_users_of_a_run_see_warnings_of_actors_once_and_progress_in_plain_lines(
    watched: Watched,
) -> None:
    def lines() -> list[str]:
        return watched.command_line.output().splitlines()

    def progressed() -> bool:
        return any(re.match(r"ppo \d+/10000 iterations, .*reward", line) for line in lines())

    wait_until(progressed, "line of progress", 30)
    warnings = [line for line in lines() if "planted" in line]
    assert len(warnings) == 1, warnings
    assert re.fullmatch(r"reward-0 scoring: WARNING: planted", warnings[0])
    assert "of no interest" not in watched.command_line.output()
    assert not re.search(r"[\r\x1b]", watched.command_line.output())


@contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Prometheus over a configuration; yields a function that asks it."""
    assert PROMETHEUS
    address = f"{LOOPBACK}:{_free_port()}"
    command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder}"]
    log = folder.with_suffix(".log")

    def ask(query: str) -> list[dict[str, Any]]:
        url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.URLError:
            return []

    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=output, stderr=output
        )
    try:
        yield ask
    finally:
        server.terminate()
        server.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus: apt-get install prometheus")
def test_prometheus_has_data_for_every_panel_of_the_dashboard(
    watched: Watched, tmp_path: Path
) -> None:
    out = tmp_path / "dashboards"
    write(out, Bounds(no_commit_minutes=60, max_kl=50))
    config = out / "prometheus" / "prometheus.yml"
    config.write_text(config.read_text().replace("10s", "1s"))
    dashboard = json.loads((out / "grafana" / "dashboards" / "rlhf_ray.json").read_text())
    queries = {
        panel["title"]: target["expr"].replace("$run", "watched")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    assert len(queries) > 50
    with prometheus(config, tmp_path / "tsdb") as ask:
        missing = dict(queries)

        def all_have_data() -> bool:
            for title in [title for title, query in missing.items() if ask(query)]:
                del missing[title]
            return not missing

        try:
            wait_until(all_have_data, "data", 40)
        except AssertionError:
            pytest.fail(f"no data for {missing}")
        record = watched.records()[-1]
        for name in record.keys() & METRICS.keys():
            values = [float(result["value"][1]) for result in ask(queries[name])]
            assert values, name
            assert all(map(math.isfinite, values)), name
        assert ask('ALERTS{alertname="RlhfKlHigh"}') == []


def test_the_trace_opens_while_the_run_goes_on_with_a_row_an_actor(watched: Watched) -> None:
    text = (watched.folder / "trace.json").read_text()
    events = json.loads(text[: text.rindex("\n")].rstrip(",") + "]")
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for event in events:
        if event["ph"] == "X":
            span = (event["ts"], event["ts"] + event["dur"], event["name"])
            spans.setdefault(event["tid"], []).append(span)
    roles = {"driver", "generator-0", "policy-0", "critic-0", "reference-0", "reward-0"}
    assert {rows[row] for row in spans} == {*roles, "disk"}
    driver = next(row for row in spans if rows[row] == "driver")
    assert {name for _, _, name in spans[driver]} >= {"gen", "score", "learn", "commit", "sync"}
    for of_row in spans.values():
        open_until: list[int] = []
        for start, end, _ in sorted(of_row, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1], "spans of a row overlap in part"
            open_until.append(end)
