from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One set of processes for all parallel tests."""
    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()
