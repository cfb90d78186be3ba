"""Prometheus's configuration: whom it asks for metrics, and when it raises an alarm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.observability.series import exported

INTERVAL = "10s"
"""Ray reports anew this often."""


@dataclass(frozen=True)
class Bounds:
    """Beyond what an alarm is raised."""

    no_commit_minutes: float
    max_kl: float
    """Nats a response."""
    min_free_disk: float = 0.1
    """Share of the disk."""


def configuration(alerts: Path, discovery: Path) -> dict[str, Any]:
    """``prometheus.yml``.

    Args:
        alerts: file of `alert_rules`.
        discovery: where Ray lists the metrics ports of all nodes.
    """
    return {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": [str(alerts)],
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)]}]},
        ],
    }


def alert_rules(bounds: Bounds) -> dict[str, Any]:
    """The file of alert rules."""
    commit, kl, disk = map(exported, ("commit/time", "objective/kl", "disk/free_share"))
    ready, target = exported("generators/ready"), exported("generators/target")
    rules = [
        _rule(
            "RlhfNoCommit",
            f"time() - {commit} > {60 * bounds.no_commit_minutes:g}",
            "1m",
            "critical",
            "{{ $labels.run }} has not committed for {{ $value | humanizeDuration }}",
            "An iteration takes long, or an actor hangs: look at the titles of its processes. "
            "Calls end by themselves after cluster.call_timeout_s.",
        ),
        _rule(
            "RlhfKlHigh",
            f"{kl} > {bounds.max_kl:g}",
            "5m",
            "warning",
            "{{ $labels.run }} is {{ $value | humanize }} nats a response from its reference",
            "The policy leaves what the reward model knows: read its completions, raise "
            "ppo.kl_coef or lower ppo.learning_rate.",
        ),
        _rule(
            "RlhfGeneratorsDead",
            f"{ready} < {target}",
            "5m",
            "warning",
            "{{ $labels.run }} works with {{ $value }} generators, fewer than it should",
            "They died and were not restarted, or the cluster has no room for them.",
        ),
        _rule(
            "RlhfDiskNearlyFull",
            f"{disk} < {bounds.min_free_disk:g}",
            "5m",
            "critical",
            "{{ $value | humanizePercentage }} of the disk of {{ $labels.run }} is free",
            "A commit that cannot be written ends the run: free space, or lower "
            "ppo.keep_checkpoints.",
        ),
    ]
    return {"groups": [{"name": "rlhf_ray", "rules": rules}]}


def _rule(
    name: str, expr: str, lasting: str, severity: str, summary: str, description: str
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }
