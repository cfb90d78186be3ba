"""Plans of the shipped configs."""

from pathlib import Path

from rlhf_ray.config import load
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.planning.plan import Plan
from rlhf_ray.planning.prediction import prediction

CONFIGS = Path(__file__).parents[1] / "configs"


def planned(path: str | Path, cluster: str, *keys: str) -> Plan:
    return prediction(load(CONFIGS / path, keys), parse_cluster(cluster))


def reasons(plan: Plan) -> str:
    return "; ".join(shortage.reason for shortage in plan.shortages)
