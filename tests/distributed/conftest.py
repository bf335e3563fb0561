"""One pool of processes for all tests here."""

from collections.abc import Iterator

import pytest

from tests.distributed.replicas import Crew, crew


@pytest.fixture(scope="session")
def pool() -> Iterator[Crew]:
    with crew(4) as replicas:
        yield replicas
