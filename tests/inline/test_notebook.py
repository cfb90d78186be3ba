"""The notebook of docs/ runs from its first cell to its last, and shows what it promises."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first_run.ipynb"


def run_cells(names: dict[str, Any]) -> list[Any]:
    """Run the code cells one after the other; the value of each cell's last line."""
    shown: list[Any] = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        lines = "".join(cell["source"]).split("\n")
        try:
            last = compile(lines[-1], "last line", "eval")
        except SyntaxError:
            exec("\n".join(lines), names)
            continue
        exec("\n".join(lines[:-1]), names)
        shown.append(eval(last, names))
    return shown


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics, figure, samples, versions, answers, win_rates, report = run_cells({})
    assert list(metrics.index) == [1, 2, 3]
    assert isinstance(figure, Figure)
    assert [axis.get_title() for axis in figure.axes] == ["objective/scores", "objective/kl"]
    assert list(samples["iteration"]) == [3] * 5
    assert versions[-1] == 3
    assert set(answers) == {"sft", *versions}
    assert win_rates
    assert report == Path("runs/first/report.html").resolve() or report.is_file()
