"""Writes the files for Grafana and Prometheus, of one's own or of a Kubernetes cluster."""

import json
import os
import tempfile
from pathlib import Path
from textwrap import dedent

import yaml

from rlhf_ray.disk import private_name
from rlhf_ray.observability.dashboards.grafana import dashboard
from rlhf_ray.observability.dashboards.prometheus import (
    Bounds,
    alert_rules,
    configuration,
    pod_monitor,
    prometheus_rule,
)

DISCOVERY = "prom_metrics_service_discovery.json"
"""Ray's list of its nodes' metrics ports, kept up to date by the head; a run on one machine that
starts Ray itself has it in the user's own folder."""


def write(folder: Path, bounds: Bounds) -> str:
    """Write all files; return instructions for using them."""
    folder = folder.absolute()
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    ray_folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"
    discoveries = (ray_folder / DISCOVERY, temporary / private_name() / "ray" / DISCOVERY)
    shown = folder / "grafana" / "dashboards" / "rlhf_ray.json"
    alerts = folder / "prometheus" / "alerts.yml"
    config = folder / "prometheus" / "prometheus.yml"
    for file in (shown, alerts):
        file.parent.mkdir(parents=True, exist_ok=True)
    shown.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")
    alerts.write_text(_yaml(alert_rules(bounds)), encoding="utf-8")
    config.write_text(_yaml(configuration(alerts, discoveries)), encoding="utf-8")
    session = ray_folder / "session_latest" / "metrics" / "grafana"
    return dedent(f"""\
        Wrote {shown}
              {alerts}
              {config}

        On the head node, before Ray starts (Ray adds its own dashboards to this folder):
          export RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR={shown.parent}
          export RAY_PROMETHEUS_HOST=http://localhost:9090 RAY_GRAFANA_HOST=http://localhost:3000
        If Ray is already running, instead:
          cp {shown} {session / "dashboards"}/
        Then start both on loopback; run Grafana in its own folder, it reads Ray's settings:
          prometheus --config.file={config} --web.listen-address=127.0.0.1:9090
          bin/grafana server --config {session / "grafana.ini"} cfg:server.http_addr=127.0.0.1""")


def write_for_kubernetes(folder: Path, bounds: Bounds, release: str) -> str:
    """Write manifests for the Prometheus operator and Grafana; return instructions for using them.

    Args:
        folder: where to write them.
        bounds: thresholds of the alerts.
        release: label by which the operator's Prometheus finds monitors and rules.
    """
    folder = folder.absolute() / "kubernetes"
    folder.mkdir(parents=True, exist_ok=True)
    # Grafana's sidecar loads what has this label, from any namespace that it watches.
    labels = {"grafana_dashboard": "1"}
    shown = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "rlhf-ray-dashboard", "labels": labels},
        "data": {"rlhf_ray.json": json.dumps(dashboard())},
    }
    manifests = {
        "pod_monitor.yaml": pod_monitor(release),
        "prometheus_rule.yaml": prometheus_rule(bounds, release),
        "grafana_dashboard.yaml": shown,
    }
    for name, manifest in manifests.items():
        (folder / name).write_text(_yaml(manifest), encoding="utf-8")
    return dedent(f"""\
        Wrote {", ".join(manifests)} into {folder}

        In the namespace of the Ray cluster:
          kubectl apply --namespace NAMESPACE -f {folder}
        Prometheus takes monitors and rules with the label release={release}, Grafana's sidecar
        ConfigMaps with the label grafana_dashboard. Whether it scrapes:
          kubectl get podmonitors --namespace NAMESPACE""")


def _yaml(content: object) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=100)
