"""The merge worker: the sum that it leaves, what a killed one leaves, and checkpoints that are not of one model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from worker_stages import REPOSITORY, WorkerStage, make_stage

from launcher.convert.__main__ import run
from launcher.errors import UserError
from launcher.progress import Stopped
from launcher.workers import merge

WEIGHTS = (0.15, 0.85)


@pytest.fixture
def pair(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> tuple[Path, Path]:
    """Two checkpoints of one model, in fp32, each of whose weights differ."""
    a = hf_checkpoint("llama")
    b = shutil.copytree(a, tmp_path / "b")
    rng = np.random.default_rng(3)
    tensors = load_file(a / "model.safetensors")
    save_file(
        {n: t + rng.standard_normal(t.shape, np.float32) for n, t in tensors.items()},
        b / "model.safetensors",
        {"format": "pt"},
    )
    return a, b


def merge_stage(root: Path, sources: tuple[Path, ...], form: str, **config: object) -> WorkerStage:
    named = dict(zip(("base", "midtrain", "more"), sources, strict=False))
    whole = {"checkpoints": list(named), "weights": WEIGHTS, "format": form, **config}
    return make_stage(root, "merge", whole, {name: (path, form) for name, path in named.items()})


def by_numpy(pair: tuple[Path, Path]) -> dict[str, np.ndarray]:
    a, b = (load_file(path / "model.safetensors") for path in pair)
    return {n: a[n] * np.float32(WEIGHTS[0]) + b[n] * np.float32(WEIGHTS[1]) for n in a}


def assert_is_the_sum(found: Path, pair: tuple[Path, Path]) -> None:
    tensors, wanted = load_file(found / "model.safetensors"), by_numpy(pair)
    assert tensors.keys() == wanted.keys()
    assert [n for n in wanted if tensors[n].tobytes() != wanted[n].tobytes()] == []


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_the_sum_is_numpys_bit_by_bit_in_either_format(form: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    sources = pair
    if form == "megatron":
        sources = (tmp_path / "m0", tmp_path / "m1")
        for path, source in zip(sources, pair, strict=True):
            run(source, path, "megatron")
    stage = merge_stage(tmp_path / "root", sources, form)
    if form == "hf":
        assert stage.run() == (0, "")
    else:
        merge.main(stage.job())
    made = stage.partial / "checkpoint"
    if form == "megatron":
        run(made, tmp_path / "back", "hf")
        made = tmp_path / "back"
    assert_is_the_sum(made, pair)
    assert (made / "tokenizer.json").read_bytes() == (pair[0] / "tokenizer.json").read_bytes()
    found = stage.record()["verification"]
    assert (found["format"], found["read_back"], found["weights"]) == (
        form,
        "the bytes that were computed",
        [*WEIGHTS],
    )
    assert found["notes"] == []


def test_a_killed_merge_is_made_anew(pair: tuple[Path, Path], tmp_path: Path) -> None:
    stage = merge_stage(tmp_path / "root", pair, "hf")
    job = stage.job()
    program = (
        "import os, signal\n"
        "from launcher.convert.hf import HfWriter\n"
        "from launcher.progress import run_worker\n"
        "from launcher.workers.merge import main\n"
        "true, count = HfWriter.add, []\n"
        "def add(self, *args):\n"
        "    count.append(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(count) == 9 else true(self, *args)\n"
        "HfWriter.add = add\n"
        "run_worker(main)\n"
    )
    from launcher.spec import stage_text

    (job.attempt_dir / "stage.json").write_text(stage_text(stage.spec))
    env = {**os.environ, "PRISM_ROOT": str(stage.root), "PRISM_ATTEMPT_DIR": str(job.attempt_dir)}
    env |= {"PRISM_STEP": "merge", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", program, str(job.attempt_dir / "stage.json")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = stage.partial / "checkpoint"
    assert (left / "model.safetensors").exists() and not (stage.partial / "record.json").exists()
    (left / "stray").write_text("of the attempt that was killed")
    merge.main(job)
    assert not (left / "stray").exists()
    assert_is_the_sum(left, pair)


def test_a_request_to_stop_ends_it(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = merge_stage(tmp_path / "root", pair, "hf").job()
    job._stop_asked(signal.SIGUSR2)
    with pytest.raises(Stopped, match="a later attempt starts this stage anew"):
        merge.main(job)


def test_weights_that_do_not_add_up_to_1_are_told(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = merge_stage(tmp_path / "root", pair, "hf", weights=[0.15, 0.8])
    merge.main(stage.job())
    assert "warning: the weights add up to 0.95, not 1" in capsys.readouterr().err
    assert stage.record()["verification"]["notes"] == ["the weights add up to 0.95, not 1"]


def test_checkpoints_of_two_models_are_refused_before_anything_is_written(
    pair: tuple[Path, Path], tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    stage = merge_stage(tmp_path / "root", (pair[0], hf_checkpoint("llama-tied")), "hf")
    with pytest.raises(UserError, match="config.json describes another model than that of"):
        merge.main(stage.job())
    assert not list((stage.partial / "checkpoint").iterdir())
    wide = shutil.copytree(pair[1], tmp_path / "wide")
    tensors = load_file(wide / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(96, np.float32)
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[96\], config\.json makes it \[48\]"):
        merge.main(merge_stage(tmp_path / "other", (pair[0], wide), "hf").job())
