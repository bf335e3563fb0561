"""One pool of processes for all programs."""

from collections.abc import Iterator

import pytest

from tests.distributed.replicas import Crew, crew


@pytest.fixture(scope="session")
def pool() -> Iterator[Crew]:
    with crew(3) as replicas:
        yield replicas
