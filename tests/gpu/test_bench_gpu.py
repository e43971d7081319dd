"""The trainer on a GPU, by what `make bench-gpu` measures; and, on any machine, a rehearsal of its plumbing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launcher.errors import UserError
from tests.bench import gpu, gpu_environment, gpu_models, gpu_setup, theirs
from tests.bench.gpu import Bench, Figure
from tests.bench.gpu_models import Case
from tests.bench.stages import model_named

STAND_IN = Path(__file__).parents[1] / "workers" / "megatron" / "pretrain_small.py"


def met(figures: list[Figure]) -> list[str]:
    return [f"{f.case}: {f.what}: {f.value}, wanted {f.wanted}" for f in figures if f.met is False]


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_checkpoints_and_losses_are_those_of_a_cpu(tmp_path: Path) -> None:
    figures = gpu.measure_agreement(Bench(tmp_path))
    assert len(figures) == 3 * 2 * 2
    assert not met(figures)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense-1b-4k", "hybrid-1b-4k"])
def test_a_model_of_a_billion_parameters_trains(tmp_path: Path, name: str) -> None:
    device, memory = gpu_environment.require_gpu()
    case = next(c for c in gpu_models.CASES if c.name == name)
    bench = Bench(tmp_path, gpu=device, memory_bytes=memory, steps=4, warm_up=1)
    figures = {f.what: f.value for f in gpu.measure_speed(bench, case)}
    assert float(figures["tokens/s"]) > 1000
    assert float(figures["fit / measured"]) == pytest.approx(1.0, abs=0.15)


# ------------------------------------------------------------------------------------------------- rehearsal, anywhere


def rehearsal(scratch: Path, **changes: object) -> Bench:
    """Tiny shapes and few steps on a CPU: that the parts fit together, and no figure of it."""
    case = Case("tiny", model_named("llama-tiny"), 64, 4, 0.5, "pretrain_small.py")
    plain = {"device": "cpu", "steps": 3, "warm_up": 1, "cases": [case], "twins": ["nemotron-h-tiny"]}
    return Bench(scratch, **{**plain, "precisions": ["fp32"], **changes})  # type: ignore[arg-type]


def test_speed_is_measured_beside_a_script_of_the_shape_of_megatron_lms(tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    slow = 'print(" elapsed time per iteration (ms): 1000.0 |\\n" * 3 + "max allocated: 2048.00 |", flush=True)'
    script = tmp_path / "checkout" / "pretrain_small.py"
    script.write_text(f"{slow}\nimport runpy\nrunpy.run_path({str(STAND_IN)!r}, run_name='__main__')\n")
    bench = rehearsal(tmp_path / "scratch", megatron_lm=tmp_path / "checkout")
    figures = {f.what: f.value for f in gpu.measure_all(bench, ["tiny"])}
    assert bench.failures == {}
    assert figures["parameters"] == pytest.approx(0.0004, rel=0.2)
    assert figures["Megatron-LM: tokens/s"] == 4 * 64 / 1.0
    assert figures["ours / Megatron-LM"] == figures["tokens/s"] / 256
    assert figures["Megatron-LM: peak memory"] == 2.0
    assert figures["fit / measured"] == pytest.approx(figures["peak memory by fit"] / figures["peak memory"])
    assert 0 < figures["of a step: backward"] < 100
    assert "MFU" not in figures, "a CPU has no known peak"


def test_agreement_is_exact_between_a_cpu_and_itself(tmp_path: Path) -> None:
    bench = rehearsal(tmp_path)
    figures = gpu.measure_all(bench, ["agreement"])
    assert bench.failures == {}
    assert [f.value for f in figures] == [0.0, 0.0, 0] and not met(figures)


def test_a_checkpoint_is_timed_beside_training_and_in_its_stead(tmp_path: Path) -> None:
    figures = {f.what: f.value for f in gpu.measure_stall(rehearsal(tmp_path))}
    assert figures["bytes"] > 3 * 4 * 0.4e6, "master weights and two moments of each"
    assert all(float(figures[what]) > 0 for what in ("start", "finish", "synchronous"))


def test_a_case_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    unknown = {"name": "odd", "family": "llama", "config": {"model_type": "odd"}}
    bench = rehearsal(tmp_path, cases=[Case(name, unknown, 64, 4, 0.5) for name in ("odd", "too")])
    assert gpu.measure_all(bench, ["odd", "too"]) == []
    assert "model type odd" in bench.failures["odd"] and bench.failures.keys() == {"odd", "too"}


def test_keys_that_differ_are_a_miss() -> None:
    text = gpu.table([Figure("c", "keys", 2, "", "0", False), Figure("c", "tokens/s", 12345.6)], {"gpu": "X"})
    assert "| c | keys | 2 | 0 | **missed** |" in text
    assert "| c | tokens/s | 1.235e+04 | | |" in text and text.endswith("gpu X\n")


# --------------------------------------------------------------------------------------------------------------- parts


def test_without_a_gpu_the_command_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="make bench-gpu"):
        gpu.main([])


def test_the_micro_batch_is_the_largest_that_fit_gives_room() -> None:
    cases = {case.name: case for case in gpu_models.CASES}
    h100, h200 = 79.2 * 2**30, 139.8 * 2**30
    found = {
        name: [(f.micro_batch_size, f.recompute) for f in (gpu.choose_layout(case, m) for m in (h100, h200))]
        for name, case in cases.items()
    }
    assert found["dense-1b-4k"] == [(4, "none"), (8, "none")]
    assert found["dense-3b-4k"] == [(1, "none"), (4, "none")]
    assert found["granite-4.0-h-micro-4k"][0] == (1, "mlp")
    with pytest.raises(RuntimeError, match="GiB are needed"):
        gpu.choose_layout(cases["dense-3b-4k"], 24 * 2**30)
    assert gpu.choose_layout(cases["dense-1b-4k"], math.inf).micro_batch_size == 8


def test_a_log_of_megatron_lm_is_read_after_its_warm_up() -> None:
    line = " [2026-08-22] iteration {0:8d}/ 5 | elapsed time per iteration (ms): {1:.1f} | throughput per GPU | "
    log = "\n".join(line.format(i, ms) for i, ms in enumerate((9000, 500, 400, 410, 390), 1))
    log += "\n[Rank 0] (after 2 iterations) memory (MB) | allocated: 1.00 | max allocated: 3072.50 | reserved: 4000.00"
    assert theirs.read_log(log, 2) == theirs.Theirs(0.4, 3072.5 / 1024)
    with pytest.raises(RuntimeError, match="elapsed time per iteration"):
        theirs.read_log("Traceback", 2)


def test_what_is_installed_depends_on_what_is_there() -> None:
    import tomllib

    project = tomllib.loads((gpu_setup.CHECKOUT / "pyproject.toml").read_text())["project"]
    extras, login = project["optional-dependencies"], project["dependencies"]

    def words(**what: bool) -> str:
        return json.dumps([step.words for step in gpu_setup.installs(extras, login, **what)])

    image, compiling, plain = (
        words(ready=True, compiler=True), words(ready=False, compiler=True), words(ready=False, compiler=False)
    )  # fmt: skip
    assert "torch>=" not in image and "transformer-engine" not in image and "megatron-core==0.16.1" in image
    assert all(name in compiling for name in ("torch>=", *gpu_setup.COMPILED))
    assert "transformer-engine" not in plain and "causal-conv1d" not in plain and "mamba-ssm" in plain
    assert "trl" not in compiling and "reasoning-gym" not in compiling
