"""Tests marked `gpu` are skipped by name where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.bench.gpu_environment import NO_GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"{item.name} {NO_GPU}, or `pytest -m gpu tests/gpu`"))
