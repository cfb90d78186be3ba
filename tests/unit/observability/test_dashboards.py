import json
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlhf_ray.cluster import session
from rlhf_ray.observability.dashboards.files import write, write_for_kubernetes
from rlhf_ray.observability.dashboards.grafana import dashboard
from rlhf_ray.observability.dashboards.panels import ROWS, panels
from rlhf_ray.observability.dashboards.prometheus import Bounds, alert_rules
from rlhf_ray.observability.metrics import METRICS
from rlhf_ray.observability.series import exported

PROMTOOL = shutil.which("promtool")
BOUNDS = Bounds(no_commit_minutes=30, max_kl=20)

RULE_TESTS = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      # Committed at 0 and, five minutes on, never again; the other one commits every minute.
      - {series: 'ray_rlhf_ray_commit_time{run="stuck"}', values: '0 60 120 180 240 300x60'}
      - {series: 'ray_rlhf_ray_commit_time{run="well"}', values: '0+60x65'}
      - {series: 'ray_rlhf_ray_objective_kl{run="stuck"}', values: '20x65'}
      - {series: 'ray_rlhf_ray_objective_kl{run="well"}', values: '2x30 21x35'}
      - {series: 'ray_rlhf_ray_generators_ready{run="stuck"}', values: '8x10 7x55'}
      - {series: 'ray_rlhf_ray_generators_target{run="stuck"}', values: '8x65'}
      - {series: 'ray_rlhf_ray_generators_ready{run="well"}', values: '8x10 7x2 8x53'}
      - {series: 'ray_rlhf_ray_generators_target{run="well"}', values: '8x65'}
      - {series: 'ray_rlhf_ray_disk_free_share{run="stuck"}', values: '0.5x40 0.05x25'}
    alert_rule_test:
      - {eval_time: 34m, alertname: RlhfNoCommit}
      - eval_time: 37m
        alertname: RlhfNoCommit
        exp_alerts:
          - exp_labels: {run: stuck, severity: critical}
            exp_annotations:
              summary: stuck has not committed for 32m 0s
              description: >-
                An iteration takes long or an actor hangs: its process titles show which one, and in
                which phase; stacks/ in the run's folder shows where. A call fails by itself after
                cluster.call_timeout_s.
      - {eval_time: 35m, alertname: RlhfKlHigh}
      - eval_time: 37m
        alertname: RlhfKlHigh
        exp_alerts:
          - exp_labels: {run: well, severity: warning}
            exp_annotations:
              summary: well is 21 nats a response away from its reference
              description: >-
                The policy moves to texts that the reward model does not know: read its
                completions, raise ppo.kl_coef or lower ppo.learning_rate.
      - eval_time: 20m
        alertname: RlhfGeneratorsDead
        exp_alerts:
          - exp_labels: {run: stuck, severity: warning}
            exp_annotations:
              summary: stuck has 7 ready generators, fewer than its target
              description: >-
                Generators died and were not restarted, or the cluster lacks capacity for them.
      - {eval_time: 40m, alertname: RlhfDiskNearlyFull}
      - eval_time: 47m
        alertname: RlhfDiskNearlyFull
        exp_alerts:
          - exp_labels: {run: stuck, severity: critical}
            exp_annotations:
              summary: Only 5% of the disk of stuck is free
              description: >-
                The run ends when a commit cannot be written: free space, or lower
                ppo.keep_checkpoints.
"""


OPTIONAL_TESTS = """
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series: [{series: 'ray_rlhf_ray_cost_per_1000_samples{run="priced"}', values: '3x5'}]
    promql_expr_test:
      - expr: EXPR
        eval_time: 2m
        exp_samples: [{labels: 'ray_rlhf_ray_cost_per_1000_samples{run="priced"}', value: 3}]
"""


def graphs() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_every_registered_metric_that_changes_over_time_has_a_panel() -> None:
    shown = "\n".join(graph["targets"][0]["expr"] for graph in graphs())
    missing = {name for name in METRICS if f"{exported(name)}{{" not in shown}
    assert missing == {name for name in METRICS if name.endswith("/<model>")}


def test_panels_of_a_row_lie_side_by_side() -> None:
    rows = {row: [panel.title for panel in members] for row, members in panels().items()}
    assert tuple(rows) == ROWS
    assert rows["Training"][0] == "objective/kl"
    assert "loss/policy_avg" in rows["Training"]
    assert "eval/score" in rows["Training"]
    assert "rollout/staleness" in rows["Generation"]
    assert "response_length/mean" in rows["Generation"]
    assert {"actors/busy/<actor>", "timing_s/sync"} <= set(rows["Roles"])
    assert {"cost/per_1000_samples", "disk/free", "GPUs busy"} <= set(rows["Cluster"])
    assert rows["Supervised stages"][:2] == ["loss", "eval_loss"]
    placed = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in placed)
    for one, other in combinations(placed, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


def test_panels_filter_by_run_and_label_each_run() -> None:
    ours = [graph for graph in graphs() if "ray_rlhf_ray_" in graph["targets"][0]["expr"]]
    assert all('run=~"$run"' in graph["targets"][0]["expr"] for graph in ours)
    legends = {graph["title"]: graph["targets"][0]["legendFormat"] for graph in ours}
    assert legends["objective/kl"] == "{{run}}"
    assert legends["objective/scores/<source>"] == "{{run}} {{source}}"
    assert legends["actors/busy/<actor>"] == "{{role}}-{{rank}}"
    assert legends["loss"] == "{{run}} {{role}}"
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    assert [variable["name"] for variable in dashboard()["templating"]["list"]] == [
        "datasource",
        "run",
    ]


def test_the_files_refer_to_each_other_and_to_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/scratch")
    monkeypatch.chdir(tmp_path)
    said = write(Path("out"), BOUNDS)
    config = yaml.safe_load((tmp_path / "out/prometheus/prometheus.yml").read_text())
    alerts = tmp_path / "out" / "prometheus" / "alerts.yml"
    assert config["rule_files"] == [str(alerts)]
    (job,) = config["scrape_configs"]
    of_cluster, of_one_machine = job["file_sd_configs"][0]["files"]
    assert of_cluster == "/scratch/ray/prom_metrics_service_discovery.json"
    monkeypatch.setattr(session, "make_private", lambda folder: folder)
    assert of_one_machine == f"{session.ray_folder()}/prom_metrics_service_discovery.json"
    assert yaml.safe_load(alerts.read_text()) == alert_rules(BOUNDS)
    shown = tmp_path / "out" / "grafana" / "dashboards" / "rlhf_ray.json"
    assert json.loads(shown.read_text()) == dashboard()
    assert f"export RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR={shown.parent}\n" in said
    *_, prometheus, grafana = said.splitlines()
    assert prometheus.split() == [
        "prometheus",
        f"--config.file={tmp_path}/out/prometheus/prometheus.yml",
        "--web.listen-address=127.0.0.1:9090",
    ]
    assert grafana.split() == [
        *("bin/grafana", "server", "--config"),
        "/scratch/ray/session_latest/metrics/grafana/grafana.ini",
        "cfg:server.http_addr=127.0.0.1",
    ]


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool: apt-get install prometheus")
def test_alerts_fire_beyond_their_thresholds(tmp_path: Path) -> None:
    write(tmp_path, BOUNDS)
    folder = tmp_path / "prometheus"
    (folder / "tests.yml").write_text(RULE_TESTS, encoding="utf-8")
    promtool(folder, "check", "config", "prometheus.yml")
    promtool(folder, "test", "rules", "tests.yml")


def promtool(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(PROMTOOL), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool: apt-get install prometheus")
def test_a_panel_of_an_optional_metric_shows_only_its_values(tmp_path: Path) -> None:
    (expr,) = (g["targets"][0]["expr"] for g in graphs() if g["title"] == "cost/per_1000_samples")
    assert "NaN" in expr
    quoted = json.dumps(expr.replace("$run", "priced"))
    (tmp_path / "tests.yml").write_text(OPTIONAL_TESTS.replace("EXPR", quoted), encoding="utf-8")
    promtool(tmp_path, "test", "rules", "tests.yml")


def test_kubernetes_manifests_carry_the_dashboard_and_the_alerts(tmp_path: Path) -> None:
    bounds = Bounds(no_commit_minutes=7, max_kl=3)
    said = write_for_kubernetes(tmp_path, bounds, "monitoring")
    folder = tmp_path / "kubernetes"
    assert f"kubectl apply --namespace NAMESPACE -f {folder}" in said
    monitor, rule, shown = (
        yaml.safe_load((folder / f"{name}.yaml").read_text())
        for name in ("pod_monitor", "prometheus_rule", "grafana_dashboard")
    )
    assert (monitor["kind"], rule["kind"]) == ("PodMonitor", "PrometheusRule")
    for manifest in (monitor, rule):
        assert manifest["apiVersion"] == "monitoring.coreos.com/v1"
        assert manifest["metadata"]["labels"] == {"release": "monitoring"}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    assert rule["spec"] == alert_rules(bounds)
    assert shown["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(shown["data"]["rlhf_ray.json"]) == dashboard()
    size = (folder / "grafana_dashboard.yaml").stat().st_size
    assert size < 2**18, "kubectl apply keeps a copy of at most 256 KiB in an annotation"


def test_kubernetes_manifests_are_valid_for_the_prometheus_operator(tmp_path: Path) -> None:
    schema = json.loads((Path(__file__).parent / "prometheus_operator_schema.json").read_text())
    write_for_kubernetes(tmp_path, BOUNDS, "monitoring")
    for name, right, wrong in (
        ("pod_monitor", '"podMetricsEndpoints"', '"endpoints"'),
        ("pod_monitor", '"10s"', "10"),
        ("prometheus_rule", '"5m"', '"5 minutes"'),
        ("prometheus_rule", '"expr"', '"expression"'),
    ):
        text = json.dumps(yaml.safe_load((tmp_path / "kubernetes" / f"{name}.yaml").read_text()))
        jsonschema.validate(json.loads(text), schema)
        assert right in text
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(text.replace(right, wrong)), schema)
