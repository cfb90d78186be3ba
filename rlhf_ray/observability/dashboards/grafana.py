"""The Grafana dashboard as JSON: rows of graphs, filtered by run."""

from rlhf_ray.observability.dashboards.panels import Panel, panels
from rlhf_ray.observability.series import EXPORTED_PREFIX

WIDTH, HEIGHT, COLUMNS = 8, 7, 3
"""Size of a panel in Grafana's grid of 24 columns, and panels per line."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SOURCE_VARIABLE = {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 2}


def dashboard() -> dict[str, object]:
    """Return the dashboard that Grafana imports."""
    return {
        "uid": "rlhfRay",
        "title": "rlhf_ray",
        "tags": ["ray", "rlhf"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_SOURCE_VARIABLE, _run()]},
        "panels": _placed(panels()),
    }


def _run() -> dict[str, object]:
    query = f'label_values({{__name__=~"{EXPORTED_PREFIX}.+"}}, run)'
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "runs"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _placed(rows: dict[str, list[Panel]]) -> list[dict[str, object]]:
    placed: list[dict[str, object]] = []
    y = 0
    for row, members in rows.items():
        position = {"x": 0, "y": y, "w": WIDTH * COLUMNS, "h": 1}
        placed.append({"id": len(placed) + 1, "type": "row", "title": row, "gridPos": position})
        y += 1
        for number, panel in enumerate(members):
            below, right = divmod(number, COLUMNS)
            position = {"x": right * WIDTH, "y": y + below * HEIGHT, "w": WIDTH, "h": HEIGHT}
            placed.append(_graph(panel) | {"id": len(placed) + 1, "gridPos": position})
        y += -(-len(members) // COLUMNS) * HEIGHT
    return placed


def _graph(panel: Panel) -> dict[str, object]:
    target = {
        "refId": "A",
        "datasource": DATASOURCE,
        "expr": panel.expr,
        "legendFormat": panel.legend,
    }
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
        "targets": [target],
    }
