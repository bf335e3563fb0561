"""Buffers of every kind have the values of a plain loop over whole batches, for any number of workers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, build_model
from tests import buffered
from tests.distributed.replicas import Case, Crew
from tests.distributed.test_unused_parameters import STEPS, trained

BATCH = 24
RUN = ["trusted_modules=[tests]", f"batch.size={BATCH}", f"steps={STEPS}", "epochs=null", "evaluate.every=end"]


@pytest.mark.parametrize(
    "model",
    [
        buffered.Largest,
        buffered.Smallest,
        buffered.Total,
        buffered.SamplesSeen,
        buffered.Average,
        buffered.Spectrum,
        buffered.Spread,
        buffered.Steps,
    ],
)
def test_a_buffer_is_that_of_a_plain_loop(pool: Crew, tmp_path: Path, model: type[nn.Module]) -> None:
    where = ["model=custom", f"model._target_=tests.buffered.{model.__name__}"]
    case = Case.of([*RUN, *where, "reduction=exact"], tmp_path)
    train, _ = build_data(case.config)
    plain = build_model(case.config, train).train()
    order = SampleOrder(len(train), BATCH, case.config.seed)
    for step in range(STEPS):
        plain(train.gather(order.samples_of(step + 1))[0])
    hashes = set()
    for world in (1, 3):
        _, found, sha256, _ = trained(pool, replace(case, run_dir=tmp_path / str(world)), world)
        torch.testing.assert_close(found["kept"], plain.kept.contiguous(), rtol=1e-5, atol=1e-6)
        hashes.add(sha256)
    assert len(hashes) == 1


def test_a_buffer_that_begins_to_depend_on_the_samples_ends_the_run_on_all_ranks(pool: Crew, tmp_path: Path) -> None:
    where = ["model=custom", "model._target_=tests.buffered.LateFlag"]
    case = Case.of([*RUN, *where, "reduction=exact"], tmp_path)
    replicas = pool.build(case, 2)
    pool.form(case, replicas)
    for reports in (replica.next_report() for replica in replicas):
        assert reports.state == "failed" and "buffer 'kept' depends on the samples from step" in reports.error, reports
    pool.give(replicas)
