"""Fixtures of several folders; this file's place also lets tests import the modules that stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from tiny_checkpoints import CONFIGS, save_checkpoint

# No test asserts by the clock: a slow machine is no failure.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.fixture(scope="session", autouse=True)
def no_profiles_of_the_users_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user keeps in ~/.config decides nothing in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`hf_checkpoint(name, dtype="float32")`: the folder of a checkpoint of `CONFIGS`; not to be changed."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("hf") / name
            save_checkpoint(made[name, dtype], CONFIGS[name], dtype)
        return made[name, dtype]

    return make


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """megatron-core in this process, alone in its process groups."""
    from launcher.workers.megatron import parallel

    with parallel.process_groups():
        yield
