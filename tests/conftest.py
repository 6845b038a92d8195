"""What every test has: a cache of its own, so that none finds what another left, nor what the user has."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For this process and those that it starts."""
    os.environ["SLIMBA_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
