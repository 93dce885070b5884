"""Data that tests of the loader share, and none of them changes."""

from __future__ import annotations

import pytest

from .captioned import Captioned, ingested


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Captioned:
    return ingested(tmp_path_factory.mktemp("captioned"))
