"""One root with token files and a tokenizer for all tests here, and one unbroken run of each model to compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import train_stages as ts


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose prepare stage has the sources `one` and `two`."""
    path = tmp_path_factory.mktemp("root")
    ts.write_tokens(ts.tokens_dir(path), {"one": 6000, "two": 3000})
    ts.write_tokenizer(ts.tokenizer_dir(path))
    return path


@pytest.fixture(scope="session")
def reference(root: Path) -> Callable[..., ts.TrainStage]:
    """Of a model, the finished stage that one process trained without a break, in 8 steps."""

    @functools.cache
    def train(name: str, precision: str) -> ts.TrainStage:
        stage = ts.make_stage(root, f"reference-{name}-{precision}", model=ts.model(name), precision=precision)
        assert ts.run(stage) == [0], ts.log(stage)
        return stage

    return lambda name, precision="fp32": train(name, precision)
