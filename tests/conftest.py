"""Fixtures of several folders; this file's place also lets tests import the modules that stand beside it."""

from __future__ import annotations

import contextlib
import os
import time
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


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group of 48 MiB of memory, for a process to enter: it is killed by Linux when it takes more."""
    v1 = Path("/sys/fs/cgroup/memory")
    folder = (v1 if v1.is_dir() else v1.parent) / f"prism-test-{os.getpid()}"
    names = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if v1.is_dir() else ("memory.max", "memory.swap.max")
    )
    try:
        folder.mkdir()
        (folder / names[0]).write_text(str(48 << 20))
        if (folder / names[1]).exists():
            (folder / names[1]).write_text(str(48 << 20) if v1.is_dir() else "0")
    except OSError as error:
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    yield folder
    for _ in range(100):  # the kernel may still be taking leave of the dead
        with contextlib.suppress(OSError):
            folder.rmdir()
            break
        time.sleep(0.1)


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """megatron-core in this process, alone in its process groups."""
    from launcher.workers.megatron import parallel

    with parallel.process_groups():
        yield
