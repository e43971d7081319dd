"""The store that the tests of this folder work in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.supervisor.counting import Store


@pytest.fixture
def at(tmp_path: Path) -> Store:
    return Store(tmp_path)
