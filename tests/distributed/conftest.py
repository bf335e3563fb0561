"""One pool of processes for all tests here, and the run that nothing disturbs."""

from collections.abc import Iterator

import pytest

from tests.distributed.led import RUN
from tests.distributed.replicas import Case, Crew, Report, crew


@pytest.fixture(scope="session")
def pool() -> Iterator[Crew]:
    with crew(4) as replicas:
        yield replicas


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(RUN, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def undisturbed(pool: Crew, case: Case) -> Report:
    return pool.train(case, 1)[0]
