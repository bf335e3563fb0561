"""What a user sees: the run's charts and its plots in MLflow's UI, in a real browser."""

import os
from pathlib import Path

import pytest

from descent.tracking import Tracker
from descent.tracking.plots import plots
from tests.end_to_end.browser import look
from tests.end_to_end.mlflow_server import MlflowServer


@pytest.mark.skipif(os.environ.get("DESCENT_NO_BROWSER") == "1", reason="DESCENT_NO_BROWSER=1: no browser wanted")
def test_the_run_page_shows_metrics_and_plots(tmp_path):
    """Screenshots go to DESCENT_SCREENSHOTS, where that is set."""
    pictures = Path(os.environ.get("DESCENT_SCREENSHOTS", tmp_path / "screenshots"))
    pictures.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(tmp_path / "server").start()
    try:
        tracker = Tracker.open(uri=server.uri, experiment="ui", run_name="seen", spool_dir=tmp_path / "spool")
        tracker.start()
        history = {
            "train/loss": [(i, 2.3 * 0.97**i) for i in range(100)],
            "eval/loss": [(i, 2.4 * 0.97**i) for i in range(0, 100, 10)],
            "train/learning_rate": [(i, 0.1 * (1 - i / 100)) for i in range(100)],
        }
        for name, points in history.items():
            for step, value in points:
                tracker.log_metrics(step, {name: value})
        for path in plots(history, tmp_path / "plots"):
            tracker.log_file(path, "plots")
        assert tracker.finish("FINISHED", deadline_s=60) == 0

        page, _, side = tracker.url.partition("?")
        look(
            f"{page}/model-metrics?{side}",
            ["train/loss", "eval/loss", "train/learning_rate", "main-svg"],
            pictures / "metrics.png",
        )
        html = look(
            f"{page}/artifacts/plots/loss.png?{side}",
            ["loss.png", "learning_rate.png", "<img"],
            pictures / "artifacts.png",
        )
        assert "Failed to load" not in html
    finally:
        server.kill()
    for name in ("metrics.png", "artifacts.png"):
        assert (pictures / name).stat().st_size > 20_000
