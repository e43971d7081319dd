"""mamba-ssm without its compiled extension: a stand-in of that shape, for here is neither it nor a GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import launcher.workers.megatron  # noqa: F401
from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.workers.megatron import layers, mamba_triton, model
from tests.bench.stages import model_named

# isort: split
from megatron.core.utils import get_mamba_version

UNBUILT = "import an_extension_that_was_not_built\n"


@pytest.fixture
def half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package whose `__init__` fails, as mamba-ssm's does without `selective_scan_cuda`, and whose kernels do not."""
    kernels = tmp_path / "half_built" / "ops" / "triton"
    kernels.mkdir(parents=True)
    (tmp_path / "half_built" / "__init__.py").write_text(UNBUILT)
    for folder in (kernels, kernels.parent):
        (folder / "__init__.py").touch()
    (kernels / "scan.py").write_text("from half_built.ops.triton.norm import EPSILON\nscan = EPSILON\n")
    (kernels / "norm.py").write_text("EPSILON = 1e-5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return str(tmp_path / "half_built")


def test_kernels_are_imported_from_a_package_that_cannot_be(half_built: str) -> None:
    with pytest.raises(ImportError):
        importlib.import_module("half_built.ops.triton.scan")
    with mamba_triton.bare_package("half_built", [half_built]):
        assert importlib.import_module("half_built.ops.triton.scan").scan == 1e-5
    assert "half_built" not in sys.modules
    with pytest.raises(ImportError):
        importlib.import_module("half_built")


def test_a_package_that_is_absent_changes_nothing() -> None:
    before = dict(sys.modules)
    mamba_triton.install()
    assert sys.modules == before


def test_what_megatron_core_and_deterministic_mode_ask_later_needs_no_whole_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not mamba_triton.has_deterministic_mode(), "it is not installed here"
    package = tmp_path / "mamba_ssm"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(UNBUILT)
    (tmp_path / "mamba_ssm-2.3.9.dist-info").mkdir()
    (tmp_path / "mamba_ssm-2.3.9.dist-info" / "METADATA").write_text("Name: mamba-ssm\nVersion: 2.3.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("megatron.core.utils._mamba_ssm_version", None)
    mamba_triton.install()
    assert str(get_mamba_version()) == "2.3.9" and "mamba_ssm" not in sys.modules
    assert not mamba_triton.has_deterministic_mode(), "as before 2.3"
    (package / "utils" / "determinism.py").touch()
    assert mamba_triton.has_deterministic_mode()


def test_without_the_scan_a_hybrid_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(model_named("nemotron-h-tiny")["config"])
    config = model.transformer_config(shape)
    monkeypatch.setattr("megatron.core.ssm.mamba_mixer.HAVE_MAMBA_SSM", False)
    with pytest.raises(UserError, match="pip install --no-build-isolation mamba-ssm"):
        layers.hybrid_layers(config, shape)
    attention_alone = shape_of(model_named("granite-4.0-micro")["config"])
    assert layers.hybrid_layers(model.transformer_config(attention_alone), attention_alone, document_masking=True)


@pytest.mark.parametrize(
    ("name", "compiler", "apex", "fused"),
    [
        (
            "llama-tiny",
            True,
            True,
            {
                "bias_activation_fusion",
                "bias_dropout_fusion",
                "cross_entropy_loss_fusion",
                "gradient_accumulation_fusion",
            },
        ),
        ("llama-tiny", False, False, set()),
        # its MLP squares and does not gate
        ("nemotron-h-tiny", True, False, {"bias_dropout_fusion", "cross_entropy_loss_fusion"}),
    ],
)
def test_a_gpu_gets_the_fusions_that_it_has_the_tools_for(
    monkeypatch: pytest.MonkeyPatch, name: str, compiler: bool, apex: bool, fused: set[str]
) -> None:
    shape = shape_of(model_named(name)["config"])
    assert not any(layers.fusions(shape).values()), "none on a CPU"
    monkeypatch.setattr(layers.cpu_mode, "active", lambda: False)
    monkeypatch.setattr(layers.shutil, "which", lambda _: "/usr/bin/cc" if compiler else None)
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: "apex" if apex and "fused" in name else None)
    found = {name for name, on in layers.fusions(shape).items() if on} - {"use_mamba_mem_eff_path"}
    assert found == fused
