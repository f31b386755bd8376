"""Pictures, such as that of a history. Runs in the parent; needs matplotlib, as no other does."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("a plot needs matplotlib: pip install 'fedproc[plot]'") from error

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes

    from fedproc.federated.history import History

_LOSS, _ACCURACY = "tab:blue", "tab:orange"


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure of a size in inches, without pyplot: that keeps figures and opens windows."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_history(history: History, path: str | os.PathLike[str]) -> None:
    """Draws training loss, evaluation loss and accuracy over the rounds.

    Args:
        history: At least one round.
        path: A file name with the ending of a picture format, such as .png or .svg.

    Raises:
        ValueError: There are no rounds.
    """
    if not len(history):
        raise ValueError("there are no rounds to plot")
    figure = new_figure(7.0, 4.0)
    left = figure.add_subplot()
    _line(left, [(r.round, r.loss) for r in history], "training loss", _LOSS, "-")
    evaluated = [(r.round, r.evaluation) for r in history if r.evaluation is not None]
    _line(left, [(n, e.loss) for n, e in evaluated], "evaluation loss", _LOSS, "--")
    left.set_xlabel("round")
    left.set_ylabel("loss", color=_LOSS)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(visible=True, alpha=0.3)
    lines = left.get_lines()
    if any(e.accuracy is not None for _, e in evaluated):
        right = left.twinx()
        points = [(n, e.accuracy) for n, e in evaluated]
        _line(right, points, "evaluation accuracy", _ACCURACY, "-")
        right.set_ylabel("accuracy", color=_ACCURACY)
        right.set_ylim(top=1.0)
        lines = [*lines, *right.get_lines()]
    left.legend(handles=lines, loc="center right")
    figure.savefig(path, dpi=120)


def _line(
    axes: Axes, points: list[tuple[int, float | None]], label: str, color: str, style: str
) -> None:
    known = [(number, value) for number, value in points if value is not None]
    if known:
        numbers, values = zip(*known, strict=True)
        marker = "." if len(known) <= 50 else ""
        axes.plot(numbers, values, style, label=label, color=color, marker=marker)
