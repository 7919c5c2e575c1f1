"""One figure of several audits: attack success, over-refusal and VQA accuracy by exit layer.

Labelled runs in, an SVG or PNG file out. Reads the runs' summaries only: no response, prompt or picture. Lines
differ in colour (Okabe and Ito's, which colour-blind readers can tell apart), dash and marker. Needs matplotlib
(`pip install "exitsafe[report]"`), which is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exitsafe.comparison import check_comparable
from exitsafe.errors import ExitsafeError, InputError, RunError
from exitsafe.runs import AuditRun
from exitsafe.runs.finished import title_in

LabelledRun = tuple[str, AuditRun]

FORMATS = (".svg", ".png")
_DPI = 200
_MAX_TICKS = 12
_INK, _MUTED, _GRID = "#1a1a1a", "#5f6368", "#e3e5e8"
_SVG_TEXT: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, and read aloud
    "svg.hashsalt": "exitsafe",  # ids, and so the file, are the same every time
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the layout is the same everywhere
    "font.size": 10,
}


@dataclass(frozen=True, kw_only=True)
class _Panel:
    metric: str
    aim: str
    unit: str


_PANELS = (
    _Panel(metric="asr", aim="lower is better", unit="harmful requests"),
    _Panel(metric="over_refusal", aim="lower is better", unit="borderline requests"),
    _Panel(metric="vqa_accuracy", aim="higher is better", unit="picture questions"),
)


@dataclass(frozen=True, kw_only=True)
class _Look:
    color: str
    dash: Any
    marker: str
    is_hollow: bool = False


_LOOKS = (
    _Look(color="#D55E00", dash=(0, (5, 2)), marker="o", is_hollow=True),
    _Look(color="#0072B2", dash="-", marker="s"),
    _Look(color="#E69F00", dash=(0, (6, 2, 1.2, 2)), marker="^", is_hollow=True),
    _Look(color="#CC79A7", dash=(0, (1.3, 1.6)), marker="D", is_hollow=True),
    _Look(color="#009E73", dash=(0, (3, 1.5)), marker="v", is_hollow=True),
    _Look(color="#56B4E9", dash=(0, (8, 2)), marker="P", is_hollow=True),
    _Look(color="#000000", dash=(0, (1, 3)), marker="X", is_hollow=True),
)


def draw_chart(runs: Sequence[LabelledRun], path: str | Path, *, title: str | None = None) -> Path:
    """Draw what the runs measured by exit layer, one line per run, with 95% intervals as bands.

    Args:
        runs: (label, run) pairs, the run to start from first; of one model, so that exit layers mean the same.
        path: Where to; its ending, .svg or .png, is the format.
        title: Above the figure; names the model if left out.

    Returns:
        The path.

    Raises:
        InputError: On another ending, no run, more runs than there are line styles, or encoders that differ.
        RunError: If no run has one of the three metrics, or the file cannot be written.
        ExitsafeError: Without matplotlib.
    """
    path = Path(path)
    _check(runs, path)
    panels = [panel for panel in _PANELS if any(_points(run, panel.metric) for _, run in runs)]
    if not panels:
        raise RunError("nothing to draw: no run has attack success, over-refusal or VQA accuracy; audit such samples")
    import matplotlib

    title = title or f"{runs[0][1].summary['model']}: safety and utility by exit layer"
    with matplotlib.rc_context(_SVG_TEXT):
        _save(_make_figure(runs, panels, title=title), path, title=title)
    return path


def _make_figure(runs: Sequence[LabelledRun], panels: Sequence[_Panel], *, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 2.95 * len(panels), 4.0), facecolor="white")
    FigureCanvasAgg(figure)  # measures text
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for (label, run), look in zip(runs, _LOOKS, strict=False):
            _draw_line(axis, _points(run, panel.metric), label=label, look=look)
        _dress(axis, panel, runs)
    _frame(figure, axes, title=title, caption=_caption(runs, panels))
    return figure


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_can_draw(path: Path) -> None:
    """Fail now if `path` could not be drawn, rather than after the work whose chart it is.

    Raises:
        InputError: On an ending other than .svg and .png.
        ExitsafeError: Without matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a chart is {' or '.join(FORMATS)}; choose one of these endings")
    if not can_draw():
        raise ExitsafeError('charts need matplotlib, which is not installed: pip install "exitsafe[report]"')


def _check(runs: Sequence[LabelledRun], path: Path) -> None:
    check_can_draw(path)
    if not 1 <= len(runs) <= len(_LOOKS):
        raise InputError(f"{len(runs)} runs cannot be drawn in one chart; give 1 to {len(_LOOKS)}")
    check_comparable([run for _, run in runs])


def _points(run: AuditRun, metric: str) -> list[tuple[int, float, float, float]]:
    """(exit layer, value, low, high), where the metric was measured."""
    found = []
    for layer in run.summary["layers"]:
        estimate = layer["metrics"].get(metric)
        if estimate is not None and estimate["value"] is not None:
            found.append((layer["exit_layer"], estimate["value"], estimate["low"], estimate["high"]))
    return found


def _draw_line(axis: Any, points: list[tuple[int, float, float, float]], *, label: str, look: _Look) -> None:
    if not points:
        return
    layers, values, lows, highs = zip(*points, strict=True)
    axis.fill_between(layers, lows, highs, color=look.color, alpha=0.13, linewidth=0)
    axis.plot(
        layers,
        values,
        label=label,
        color=look.color,
        linestyle=look.dash,
        linewidth=1.8,
        marker=look.marker,
        # hollow and larger, so that a line which lies under another still shows
        markersize=6.5 if look.is_hollow else 4.2,
        markerfacecolor="white" if look.is_hollow else look.color,
        markeredgewidth=1.3,
        clip_on=False,
        zorder=3 if look.is_hollow else 4,
    )


def _dress(axis: Any, panel: _Panel, runs: Sequence[LabelledRun]) -> None:
    """Scales, ticks, the mark of the default exit and the panel's heading."""
    from matplotlib.ticker import PercentFormatter

    layers = sorted({layer for _, run in runs for layer in run.exit_layers})
    defaults = {run.summary["default_exit"] for _, run in runs}
    default_exit = defaults.pop() if len(defaults) == 1 else None
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    ticks = _ticks(layers, default_exit)
    axis.set_xticks(ticks, [str(layer) for layer in ticks])
    if default_exit in layers:
        axis.axvline(default_exit, color=_MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        axis.get_xticklabels()[ticks.index(default_exit)].set_fontweight("bold")
        below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center", "va": "top"}
        axis.annotate("default", (default_exit, 0), (0, -18), color=_INK, fontweight="bold", **below)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=_INK, pad=6)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_MUTED)
    axis.set_title(
        title_in((run for _, run in runs), panel.metric),
        loc="left",
        fontweight="bold",
        fontsize=10.5,
        color=_INK,
        pad=21,
    )
    axis.annotate(
        panel.aim, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=_MUTED, fontsize=9
    )


def _ticks(layers: list[int], default_exit: int | None) -> list[int]:
    """The layers to name: all of a few; of many, some and the default exit, clear of its neighbours."""
    if len(layers) <= _MAX_TICKS:
        return layers
    step = -(-len(layers) // (_MAX_TICKS // 2))
    chosen = layers[::step]
    if default_exit in layers and default_exit not in chosen:
        # the word under the default exit is three numbers wide
        room = 1.3 * (layers[-1] - layers[0]) / _MAX_TICKS
        chosen = [layer for layer in chosen if abs(layer - default_exit) > room]
        chosen = sorted([*chosen, default_exit])
    return chosen


def _caption(runs: Sequence[LabelledRun], panels: Sequence[_Panel]) -> str:
    counts = []
    for panel in panels:
        per_layer = [
            layer["metrics"][panel.metric]["n"]
            for _, run in runs
            for layer in run.summary["layers"]
            if panel.metric in layer["metrics"]
        ]
        low, high = min(per_layer), max(per_layer)
        counts.append(f"{low if low == high else f'{low} to {high}'} {panel.unit}")
    return f"n per exit layer: {', '.join(counts)}.  Bands: 95% intervals.  Default: the exit of the untouched model."


def _frame(figure: Any, axes: Any, *, title: str, caption: str) -> None:
    """What all panels share: title, legend, name of the x axis, caption; placed in inches from the edges."""
    width, height = figure.get_size_inches()
    edge, right = 0.14 / width, 1 - 0.22 / width
    figure.text(edge, 1 - 0.14 / height, title, fontsize=13, fontweight="bold", color=_INK, va="top")
    # a panel may lack a run: the legend takes each label once, in the order of the runs
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    rows, legend = 1, _legend(figure, entries, num_columns=len(entries), corner=(edge, 1 - 0.42 / height))
    while legend.get_window_extent().x1 > right * figure.bbox.x1 and rows < len(entries):
        legend.remove()
        rows += 1
        legend = _legend(figure, entries, num_columns=-(-len(entries) // rows), corner=(edge, 1 - 0.42 / height))
    top = 1 - (0.98 + 0.22 * rows) / height
    figure.subplots_adjust(left=0.62 / width, right=right, top=top, bottom=0.98 / height, wspace=0.1)
    figure.text(0.5, 0.40 / height, "exit layer (encoder blocks executed)", ha="center", color=_INK)
    figure.text(edge, 0.12 / height, caption, fontsize=8, color=_MUTED)


def _legend(figure: Any, entries: dict[str, Any], *, num_columns: int, corner: tuple[float, float]) -> Any:
    return figure.legend(
        entries.values(),
        entries.keys(),
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=num_columns,
        frameon=False,
        handlelength=2.9,
        columnspacing=1.6,
        borderpad=0,
        borderaxespad=0,
        labelcolor=_INK,
    )


def _save(figure: Any, path: Path, *, title: str) -> None:
    # without dates and versions, the same runs give the same bytes
    metadata = {"Date": None, "Creator": None, "Title": title} if path.suffix.lower() == ".svg" else {"Software": None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=path.suffix.lower()[1:], dpi=_DPI, metadata=metadata)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
