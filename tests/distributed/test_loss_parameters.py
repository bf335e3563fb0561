"""Parameters of the loss are trained with the model, kept in checkpoints, and no part of the model that is exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from descent.checkpoint.manifest import read_manifest
from descent.checkpoint.reader import files_of_rank, read_files
from descent.checkpoint.weights import read_weights
from descent.cluster.run.tested import test_figures as figures_of_the_test_set
from descent.config import compose
from descent.training.plan import prepare
from tests.distributed.replicas import Case, Crew
from tests.distributed.test_resume import resumed, saved
from tests.programs.arcface import PROGRAM, trained_by_hand
from tests.programs.pictures import Pictures
from tests.programs.program import RUN


@pytest.mark.parametrize("more", [[], ["ema.decay=0.5", "reduction=fast"]], ids=["exact", "fast and averaged"])
def test_they_are_trained_and_saved_beside_the_model(pool: Crew, tmp_path: Path, more: list[str]) -> None:
    case = Case.of([*RUN, *PROGRAM.overrides, *more], tmp_path / "run", 1)
    whole, (middle, last) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 1, 3, 6)
    losses, model, loss = trained_by_hand()
    assert whole[0].losses == pytest.approx(losses, rel=1e-4)
    manifest = read_manifest(last)
    tensors = read_files(last, manifest, files_of_rank(manifest, 0, 1))
    for name, parameter in loss.named_parameters():
        assert torch.allclose(tensors[f"loss/{name}"], parameter, atol=1e-5), name
        assert (f"loss/ema/{name}" in tensors) == bool(more)
    weights = read_weights(last)
    assert weights.keys() == model.state_dict().keys()
    if not more:
        assert all(torch.allclose(weights[n], p, atol=1e-5) for n, p in model.named_parameters())
    if not more:
        tested = ["data.test={_target_: tests.programs.pictures.Pictures}"]
        prepared = prepare(compose([*RUN, *PROGRAM.overrides, *tested]).config, cores=1.0, gpus=0.0)
        figure = figures_of_the_test_set(case.config, prepared, last)["test/loss"]
        data = Pictures()
        with torch.no_grad():
            expected = float(loss(model.eval()(data.images), data.labels))
        assert figure == pytest.approx(expected, rel=1e-4)
    assert resumed(pool, case, middle, 1).finish().state_sha256 == whole[0].sha256
