"""Plots: which there are, at what size, and that downsampling loses no extreme."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descent.tracking.plots import downsample, plots


def history(steps: int = 200) -> dict[str, list[tuple[int, float]]]:
    rng = np.random.default_rng(0)
    values = {
        "train/loss": lambda i: 100 * 0.9**i + 0.01,
        "train/learning_rate": lambda i: 0.1 / (i + 1),
        "perf/samples_per_second": lambda i: 900 + i * rng.normal(),
        "grad/norm": lambda i: 1.0 + i,
        **{f"grad/norm/layer{d}": (lambda i, d=d: 10.0 ** (-d) * (i + 1)) for d in range(30)},
    }
    curves = {name: [(i, float(f(i))) for i in range(steps)] for name, f in values.items()}
    curves["eval/loss"] = [(i, 1.0 / (i + 1)) for i in range(0, steps, 50)]
    curves["eval/accuracy"] = [(i, 1 - 1.0 / (i + 1)) for i in range(0, steps, 50)]
    curves["cluster/world_size"] = [(0, 2.0), (50, 1.0), (100, 2.0)]
    return curves


def test_a_full_history_gives_all_plots(tmp_path):
    paths = plots(history(), tmp_path / "new")
    assert [path.name for path in paths] == [
        "loss.png",
        "accuracy.png",
        "learning_rate.png",
        "gradient_norms.png",
        "gradient_depth.png",
        "throughput.png",
    ]
    for path in paths:
        image = matplotlib.image.imread(path)
        assert image.shape[:2] == (700, 1200)
        assert image[..., :3].std() > 0.02  # not blank


def test_a_plot_without_values_is_left_out(tmp_path):
    assert plots({}, tmp_path) == []
    paths = plots({"eval/loss": [(0, 1.0)], "train/loss": []}, tmp_path)
    assert [path.name for path in paths] == ["loss.png"]


@pytest.mark.parametrize("bad", [[np.nan] * 3, [np.inf, 1.0, 2.0], [0.0, 0.0, 0.0], [1e-300, 1e300, 1.0], [-1.0, 0, 2]])
def test_odd_values_are_drawn_all_the_same(tmp_path, bad):
    names = [*history(3), "grad/norm/a", "grad/norm/b"]
    assert plots({name: list(enumerate(bad)) for name in names}, tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), max_size=300), st.integers(1, 20))
def test_downsampling_keeps_the_extremes_and_the_order(values, buckets):
    array = np.array(values, dtype=np.float64)
    steps, kept = downsample(np.arange(len(array)), array, buckets)
    assert len(kept) <= max(2 * buckets, 0)
    assert np.all(np.diff(steps) > 0)
    np.testing.assert_array_equal(array[steps], kept)
    finite = array[np.isfinite(array)]
    if len(finite):
        assert kept.max() == finite.max()
        assert kept.min() == finite.min()


def test_drawing_does_not_load_pyplot(tmp_path):
    code = (
        "import sys, pathlib; from descent.tracking.plots import plots;"
        "plots({'train/loss': [(0, 1.0), (1, .5)]}, pathlib.Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_incidents_are_marked_on_the_plots_over_time(tmp_path):
    quiet = {path.name: path.read_bytes() for path in plots(history(), tmp_path / "quiet")}
    incidents = [(40, "worker lost"), (90, "preempted"), (90, "worker lost")]
    marked = {path.name: path.read_bytes() for path in plots(history(), tmp_path / "marked", incidents)}
    differ = {name for name in quiet if quiet[name] != marked[name]}
    assert differ == {"loss.png", "accuracy.png", "learning_rate.png", "throughput.png"}


def test_the_label_of_a_layer_stands_at_its_own_point():
    """Of a slanted label the end is what points at the tick; no two labels touch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from descent.tracking.plots import _curve, _gradient_depth

    figure = _gradient_depth({name: _curve(points) for name, points in history().items()})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    assert len(labels) > 10
    ticks = axes.transData.transform([(tick, 1.0) for tick in axes.get_xticks()])[:, 0]
    for label, tick in zip(labels, ticks, strict=True):
        assert label.get_text() == f"layer{round(float(label.get_position()[0]))}"
        assert abs(label.get_window_extent().x1 - tick) < 25  # pixels of 1,200
    assert np.all(np.diff(ticks) > 25)
