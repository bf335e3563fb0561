"""The plots that a run keeps: loss, accuracy, learning rate, gradient norms over depth and time, throughput.

They are drawn with matplotlib's Figure and the Agg canvas directly. pyplot's global state isn't touched,
so this may run on any thread.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

History = Mapping[str, Sequence[tuple[int, float]]]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps, values: [n] each

WIDTH_PX, HEIGHT_PX, DPI = 1200, 700, 100
BUCKETS = 1000  # about the width of the axes in pixels
LAYER_PREFIX = "grad/norm/"
BLUE, ORANGE, GREY, RED = "#1f6fb4", "#d95f0e", "#8a8f98", "#b2182b"
_MARKED = ("loss", "accuracy", "learning_rate", "throughput")
"""The plots whose horizontal axis is the step, and that have room for the marks of incidents."""
_NAMED_INCIDENTS = 6
"""Of more incidents than these, the marks alone are drawn."""


def plots(history: History, out_dir: Path, incidents: Sequence[tuple[int, str]] = ()) -> list[Path]:
    """Draw each plot for which `history` (metric name -> (step, value)s) has values.

    incidents: (step, kind) of each; they are marked on the plots over time.

    Returns the PNGs' paths: loss, accuracy, learning_rate, gradient_norms, gradient_depth, throughput.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    curves = {name: _curve(points) for name, points in history.items() if len(points)}
    drawers: dict[str, Callable[[dict[str, Curve]], Figure | None]] = {
        "loss": _loss,
        "accuracy": _accuracy,
        "learning_rate": _learning_rate,
        "gradient_norms": _gradient_norms,
        "gradient_depth": _gradient_depth,
        "throughput": _throughput,
    }
    paths = []
    for name, draw in drawers.items():
        figure = draw(curves)
        if figure is not None:
            if name in _MARKED:
                _mark_incidents(figure, incidents)
            path = out_dir / f"{name}.png"
            FigureCanvasAgg(figure).print_png(str(path))
            paths.append(path)
    return paths


def empty_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, whose parts don't overlap."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def write_png(figure: Figure, path: Path) -> None:
    """Draw a figure into a file."""
    FigureCanvasAgg(figure).print_png(str(path))


def downsample(steps: NDArray[Any], values: NDArray[Any], buckets: int = BUCKETS) -> Curve:
    """At most 2 points per bucket, its lowest and its highest, in order: no spike is lost.

    `steps`, `values`: [n] each, in the order of the steps. What isn't finite is left out.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= 2 * buckets:
        return steps, values
    edges = np.linspace(0, len(values), buckets + 1).astype(np.int64)
    bucket_of = np.repeat(np.arange(buckets), np.diff(edges))
    order = np.lexsort((values, bucket_of))  # within each bucket by value
    keep = np.union1d(order[edges[:-1]], order[edges[1:] - 1])
    return steps[keep], values[keep]


def _curve(points: Sequence[tuple[int, float]]) -> Curve:
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if np.any(np.diff(array[:, 0]) < 0):
        array = array[np.argsort(array[:, 0], kind="stable")]
    steps, values = array[:, 0], array[:, 1]
    # a training that diverges passes this on its way to infinity; tick marks can't follow it
    values = np.where(np.abs(values) < 1e30, values, np.nan)
    return steps, np.where(np.abs(values) < 1e-30, 0.0, values)


def _axes(title: str, ylabel: str, xlabel: str = "step (optimizer updates)") -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_PX / DPI, HEIGHT_PX / DPI), dpi=DPI, layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=17, fontweight="bold", pad=14)
    axes.set_xlabel(xlabel, fontsize=13)
    axes.set_ylabel(ylabel, fontsize=13)
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return figure, axes


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over 2% of the points, shorter at the ends."""
    half = max(1, len(values) // 100)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _draw_noisy(axes: Any, curve: Curve, color: str, label: str) -> None:
    """A curve; when it has many points, pale with its moving average on top."""
    finite = np.isfinite(curve[1])
    steps, values = curve[0][finite], curve[1][finite]
    if len(values) < 100:
        axes.plot(steps, values, color=color, linewidth=2, label=label)
        return
    axes.plot(*downsample(steps, values), color=color, linewidth=0.8, alpha=0.35)
    axes.plot(*downsample(steps, _smooth(values)), color=color, linewidth=2.2, label=label)


def _span_decades(*arrays: NDArray[np.float64]) -> float:
    """Decades between the smallest and the largest value; 0 unless all are positive."""
    values = np.concatenate(arrays)
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() <= 0:
        return 0.0
    return float(np.log10(values.max() / values.min()))


def _loss(curves: dict[str, Curve]) -> Figure | None:
    train, evaluation = curves.get("train/loss"), curves.get("eval/loss")
    if train is None and evaluation is None:
        return None
    figure, axes = _axes("Loss", "loss (mean per sample)")
    if train is not None:
        _draw_noisy(axes, train, BLUE, "training")
    if evaluation is not None:
        steps, values = downsample(*evaluation)
        marker = "o" if len(steps) <= 60 else None
        axes.plot(steps, values, color=ORANGE, linewidth=2.2, marker=marker, label="evaluation")
        if len(values):
            best = int(np.argmin(values))
            axes.annotate(
                f"best {values[best]:.4g} at step {int(steps[best]):,}",
                (steps[best], values[best]),
                xytext=(-10, 34),
                textcoords="offset points",
                ha="right",
                fontsize=12,
                color=ORANGE,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
                arrowprops={"arrowstyle": "-", "color": ORANGE},
            )
    if _span_decades(*(curve[1] for curve in (train, evaluation) if curve is not None)) > 2:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=13, loc="upper right")
    return figure


def _accuracy(curves: dict[str, Curve]) -> Figure | None:
    curve = curves.get("eval/accuracy")
    if curve is None or not np.any(np.isfinite(curve[1])):
        return None
    figure, axes = _axes("Accuracy", "held-out samples classified correctly")
    steps, values = downsample(*curve)
    marker = "o" if len(steps) <= 60 else None
    axes.plot(steps, values, color=ORANGE, linewidth=2.2, marker=marker, label="evaluation")
    best = int(np.argmax(values))
    axes.axhline(values[best], color=ORANGE, linewidth=1, linestyle=":")
    axes.annotate(
        f"best {values[best]:.2%} at step {int(steps[best]):,}",
        (1.0, values[best]),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=12,
        color=ORANGE,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(top=min(1.02, float(np.max(values)) * 1.08 + 1e-9))
    return figure


def _mark_incidents(figure: Figure, incidents: Sequence[tuple[int, str]]) -> None:
    """A thin red line at the step of each incident, with its kind where there are few."""
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    steps = sorted({step for step, _ in incidents if low <= step <= high})
    for step in steps:
        axes.axvline(step, color=RED, linewidth=0.9, linestyle="--", alpha=0.6, zorder=0)
    if not 0 < len(steps) <= _NAMED_INCIDENTS:
        return
    for step in steps:
        kinds = sorted({kind for at, kind in incidents if at == step})
        axes.text(
            step,
            0.03,
            f" {', '.join(kinds)}",
            transform=axes.get_xaxis_transform(),
            rotation=90,
            va="bottom",
            ha="right",
            fontsize=10,
            color=RED,
        )


def _learning_rate(curves: dict[str, Curve]) -> Figure | None:
    curve = curves.get("train/learning_rate")
    if curve is None:
        return None
    figure, axes = _axes("Learning rate", "learning rate")
    steps, values = downsample(*curve)
    axes.plot(steps, values, color=BLUE, linewidth=2.2)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_ylim(bottom=0)
    return figure


def _throughput(curves: dict[str, Curve]) -> Figure | None:
    curve = curves.get("perf/samples_per_second")
    if curve is None:
        return None
    figure, axes = _axes("Throughput", "samples per second")
    _draw_noisy(axes, curve, BLUE, "all workers together")
    axes.set_ylim(bottom=0)
    size = curves.get("cluster/world_size")
    if size is not None and len(np.unique(size[1])) > 1:
        right = axes.twinx()
        right.step(*downsample(*size), where="post", color=GREY, linewidth=1.5)
        right.set_ylabel("workers", fontsize=13, color=GREY)
        right.set_ylim(0, float(np.nanmax(size[1])) + 1)
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
        right.spines["top"].set_visible(False)
    axes.legend(frameon=False, fontsize=13, loc="lower right")
    return figure


def _layers(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Gradient norms by layer, in the order of `curves`: the network's, from the input on."""
    return {
        name.removeprefix(LAYER_PREFIX): curve
        for name, curve in curves.items()
        if name.startswith(LAYER_PREFIX) and np.any(curve[1] > 0)
    }


def _gradient_norms(curves: dict[str, Curve]) -> Figure | None:
    layers = _layers(curves)
    if not layers:
        return None
    first = min(curve[0][0] for curve in layers.values())
    last = max(curve[0][-1] for curve in layers.values())
    longest = max(len(curve[0]) for curve in layers.values())
    edges = np.linspace(first, last + 1, min(longest, 300) + 1)
    grid = np.vstack([_bucket_means(curve, edges) for curve in layers.values()])
    figure, axes = _axes("Gradient norm by layer over time", "layer (input at the top)")
    axes.grid(False)
    shown = np.ma.masked_less_equal(np.ma.masked_invalid(grid), 0)
    low, high = float(shown.min()), float(shown.max())
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(layers) + 1),
        shown,
        cmap="viridis",
        norm=LogNorm(low, high if high > low else low * 10),
    )
    axes.set_facecolor("#dddddd")  # no value, or exactly 0
    axes.invert_yaxis()
    _name_layers(axes.yaxis, list(layers), at=0.5)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015)
    bar.set_label("L2 norm of the gradient (log scale)", fontsize=13)
    bar.ax.tick_params(labelsize=12)
    return figure


def _bucket_means(curve: Curve, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the finite values in each interval [edges[i], edges[i+1]); before and between
    values the last one goes on, so that a coarse cadence leaves no stripes."""
    finite = np.isfinite(curve[1])
    steps, values = curve[0][finite], curve[1][finite]
    count, _ = np.histogram(steps, edges)
    total, _ = np.histogram(steps, edges, weights=values)
    means = np.full(len(count), np.nan)
    means[count > 0] = total[count > 0] / count[count > 0]
    filled = np.maximum.accumulate(np.where(count > 0, np.arange(len(count)), 0))
    return means[filled]


def _gradient_depth(curves: dict[str, Curve]) -> Figure | None:
    layers = _layers(curves)
    if len(layers) < 2:
        return None
    figure, axes = _axes("Gradient norm by depth", "L2 norm of the gradient", "layer")
    steps = np.unique(np.concatenate([curve[0] for curve in layers.values()]))
    chosen = np.unique(steps[np.linspace(0, len(steps) - 1, 5).astype(int)])
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(chosen)))
    drawn = []
    for step, color in zip(chosen, colors, strict=True):
        norms = np.array([_value_at(curve, step) for curve in layers.values()])
        norms[~(norms > 0)] = np.nan  # has no place on a log scale
        drawn.append(norms)
        label = f"step {int(step):,}"
        axes.plot(range(len(layers)), norms, marker="o", color=color, linewidth=2, label=label)
    if _span_decades(np.concatenate(drawn)[~np.isnan(np.concatenate(drawn))]) > 1:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _name_layers(axes.xaxis, list(layers), at=0.0)
    if len(layers) > 6:  # a slanted label ends below its own tick, not a layer beside it
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", va="top", rotation_mode="anchor")
    axes.legend(frameon=False, fontsize=13, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _value_at(curve: Curve, step: float) -> float:
    """The value at `step`, or at the last one before it, or at the first."""
    index = int(np.searchsorted(curve[0], step, side="right")) - 1
    return float(curve[1][max(index, 0)])


def _name_layers(axis: Any, names: list[str], at: float) -> None:
    """Label the layers; when there are many, evenly spaced ones, so that no two labels touch."""
    shown = np.arange(0, len(names), -(-len(names) // 24))
    labels = [names[i] if len(names[i]) <= 28 else "…" + names[i][-27:] for i in shown]
    axis.set_ticks(shown + at, labels=labels)
