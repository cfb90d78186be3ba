"""Writes the files for Grafana and Prometheus, and explains how to use them."""

import json
import os
import tempfile
from pathlib import Path
from textwrap import dedent

import yaml

from rlhf_ray.disk import private_name
from rlhf_ray.observability.dashboards.grafana import dashboard
from rlhf_ray.observability.dashboards.prometheus import Bounds, alert_rules, configuration

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


def _yaml(content: object) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=100)
