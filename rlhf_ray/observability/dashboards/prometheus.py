"""Prometheus's configuration: which endpoints it scrapes, and its alert rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.observability.series import exported

INTERVAL = "10s"
"""Interval in which Ray refreshes its metrics."""


@dataclass(frozen=True)
class Bounds:
    """Thresholds of the alert rules."""

    no_commit_minutes: float
    max_kl: float
    """Nats per response."""
    min_free_disk: float = 0.1
    """Share of the disk."""


def configuration(alerts: Path, discoveries: Sequence[Path]) -> dict[str, object]:
    """Return the contents of ``prometheus.yml``.

    Args:
        alerts: file of alert rules.
        discoveries: where Ray may list its nodes' metrics ports.
    """
    files = [str(path) for path in discoveries]
    return {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": [str(alerts)],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": files}]}],
    }


def alert_rules(bounds: Bounds) -> dict[str, object]:
    """Return the contents of the file of alert rules."""
    commit, kl, disk = map(exported, ("commit/time", "objective/kl", "disk/free_share"))
    ready, target = exported("generators/ready"), exported("generators/target")
    rules = [
        _rule(
            "RlhfNoCommit",
            f"time() - {commit} > {60 * bounds.no_commit_minutes:g}",
            "1m",
            "critical",
            "{{ $labels.run }} has not committed for {{ $value | humanizeDuration }}",
            "An iteration takes long or an actor hangs: its process titles show which one, and in "
            "which phase; stacks/ in the run's folder shows where. A call fails by itself after "
            "cluster.call_timeout_s.",
        ),
        _rule(
            "RlhfKlHigh",
            f"{kl} > {bounds.max_kl:g}",
            "5m",
            "warning",
            "{{ $labels.run }} is {{ $value | humanize }} nats a response away from its reference",
            "The policy moves to texts that the reward model does not know: read its "
            "completions, raise ppo.kl_coef or lower ppo.learning_rate.",
        ),
        _rule(
            "RlhfGeneratorsDead",
            f"{ready} < {target}",
            "5m",
            "warning",
            "{{ $labels.run }} has {{ $value }} ready generators, fewer than its target",
            "Generators died and were not restarted, or the cluster lacks capacity for them.",
        ),
        _rule(
            "RlhfDiskNearlyFull",
            f"{disk} < {bounds.min_free_disk:g}",
            "5m",
            "critical",
            "Only {{ $value | humanizePercentage }} of the disk of {{ $labels.run }} is free",
            "The run ends when a commit cannot be written: free space, or lower "
            "ppo.keep_checkpoints.",
        ),
    ]
    return {"groups": [{"name": "rlhf_ray", "rules": rules}]}


def pod_monitor(release: str) -> dict[str, object]:
    """Return the manifest by which the Prometheus operator scrapes the pods of Ray clusters."""
    cluster = {
        "sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"],
        "targetLabel": "ray_io_cluster",
    }
    # KubeRay names the port of each container of Ray so, and gives each pod this label.
    endpoint = {"port": "metrics", "interval": INTERVAL, "relabelings": [cluster]}
    pods = {"matchExpressions": [{"key": "ray.io/node-type", "operator": "Exists"}]}
    return _of_operator(
        "PodMonitor", release, {"selector": pods, "podMetricsEndpoints": [endpoint]}
    )


def prometheus_rule(bounds: Bounds, release: str) -> dict[str, object]:
    """Return the alert rules as a manifest of the Prometheus operator."""
    return _of_operator("PrometheusRule", release, alert_rules(bounds))


def _of_operator(kind: str, release: str, spec: dict[str, object]) -> dict[str, object]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": kind,
        "metadata": {"name": "rlhf-ray", "labels": {"release": release}},
        "spec": spec,
    }


def _rule(
    name: str, expr: str, lasting: str, severity: str, summary: str, description: str
) -> dict[str, object]:
    return {
        "alert": name,
        "expr": expr,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }
