"""Charts of the report as inline SVG, coloured by the page's CSS in light, dark and print."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-in colours, replaced in the SVG by the page's CSS variables of the same names.
_VARIABLES = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--grid",
    "#040404": "--c1",
    "#050505": "--c2",
    "#060606": "--c3",
    "#070707": "--c4",
    "#080808": "--c5",
    "#090909": "--c6",
    "#0a0a0a": "--c7",
    "#0b0b0b": "--card",
}
_INK, _MUTED, _GRID, *_COLOURS, _CARD = _VARIABLES
MAX_CURVES = len(_COLOURS)
"""Lines of a chart that can be told apart."""
_EVALUATION_COLOUR = _COLOURS[1]
_WIDTH_INCHES = 5.4
_STEPS = [1, 2, 5, 10]

# Every chart sets svg.hashsalt and drops the date, so that the same data gives the same bytes.

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and follows the page's font
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a label with two dollar signs would be typeset as a formula
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart: parallel x and y; NaN leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    is_points: bool = False
    """Whether these are sparse evaluations, drawn as dots; other curves get a smoothed line."""


def curves(title: str, lines: Sequence[Curve], x_label: str, marks: Sequence[float] = ()) -> str:
    """Draw a line chart as SVG: pale raw values, a smoothed line on top, evaluations as dots.

    A dashed line stands behind each of ``marks``, the last x before something was changed.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(2.5)
        for line, colour in zip(lines, _COLOURS, strict=False):
            _draw_curve(axes, line, colour)
        for mark in marks:
            axes.axvline(mark + 0.5, color=_MUTED, linewidth=0.8, linestyle="--")
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=_STEPS, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))
        # Whole numbers at the ticks: an offset or a power of ten at the axis' end is overlooked.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.margins(x=0.02, y=0.1)
        if not any(line.y and np.nanmax(np.abs(line.y)) > 0 for line in lines):
            axes.set_ylim(-0.05, 1)  # else a share that stays zero hangs between -.05 and .05
        if len(lines) > 1:
            axes.legend(loc="best")
        return _svg(figure, title)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return the centred moving average over a tenth of the values, at least 3; NaN is skipped.

    The window shrinks at both ends, so that no values are invented there.
    """
    array = np.asarray(values, dtype=float)
    half = max(1, len(array) // 20)
    smoothed = np.full(len(array), np.nan)
    for index in range(len(array)):
        window = array[max(0, index - half) : index + half + 1]
        if not np.isnan(window).all():
            smoothed[index] = np.nanmean(window)
    return smoothed


def histogram(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
) -> str:
    """Draw bars over ordered bins as SVG, a colour per series."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(2.5)
        width = 0.84 / len(series)
        for index, ((name, values), colour) in enumerate(
            zip(series.items(), _COLOURS, strict=False)
        ):
            places = np.arange(len(values)) + (index - (len(series) - 1) / 2) * width
            axes.bar(places, values, width=width, color=colour, label=name)
        axes.set_xticks(range(len(labels)), labels=list(labels))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))
        if len(series) > 1:
            axes.legend(loc="best")
        return _svg(figure, title)


def counts(title: str, numbers: Mapping[str, float], x_label: str) -> str:
    """Draw a horizontal bar per name as SVG, in the given order."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title, "axes.grid.axis": "x"}):
        figure, axes = _figure(max(1.2, 0.6 + 0.24 * len(numbers)))
        axes.barh(range(len(numbers)), list(numbers.values()), color=_COLOURS[0], **_BAR)
        _label_rows(axes, list(numbers), x_label)
        return _svg(figure, title)


_BAR: dict[str, Any] = {"height": 0.66, "linewidth": 0.4, "edgecolor": _CARD}


def _figure(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots()


def _draw_curve(axes: Axes, line: Curve, colour: str) -> None:
    if line.is_points:
        colour = _EVALUATION_COLOUR
        axes.plot(
            line.x, line.y, "o--", color=colour, markersize=4, linewidth=0.8, label=line.label
        )
        return
    if len(line.y) < 5:
        axes.plot(line.x, line.y, "o-", color=colour, markersize=3, linewidth=1.2, label=line.label)
        return
    axes.plot(line.x, line.y, color=colour, linewidth=0.9, alpha=0.35)
    axes.plot(line.x, smooth(line.y), color=colour, linewidth=1.8, label=line.label)


def _label_rows(axes: Axes, rows: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(rows)), labels=list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(unit)
    axes.margins(x=0)


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an SVG element without prologue, metadata, fixed size or colours."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Titles hold names of the user's data, which may be those of a stranger's files.
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    svg = svg.replace("'DejaVu Sans'", "system-ui")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
