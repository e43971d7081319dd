"""What megatron-core finds where it asks for CUDA and there is none."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import launcher.workers.megatron  # noqa: F401
from launcher.workers.megatron import cpu_mode


def test_it_is_on_here_and_says_what_it_means() -> None:
    assert cpu_mode.active() is not torch.cuda.is_available()
    assert cpu_mode.install() is cpu_mode.active()  # a second time changes nothing
    for word in ("cpu_mode", "CUDA", "reference kernels"):
        assert word in cpu_mode.NOTICE


def test_what_cuda_reads_at_its_start_is_set_before() -> None:
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    assert any(name in os.environ for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here, and cpu_mode is off")
def test_cuda_means_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(1, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.zeros(2).to("cuda", torch.float64).dtype == torch.float64
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.zeros(2).to("meta").device.type == "meta"
    assert torch.cuda.current_device() == torch.device("cpu")
    names = {dtype: torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16, torch.int64)}
    assert names[torch.float32] == "torch.cuda.FloatTensor"
    assert names[torch.bfloat16] == "torch.cuda.BFloat16Tensor"
    assert names[torch.int64] == "torch.LongTensor"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here, and cpu_mode is off")
def test_other_libraries_do_not_find_the_stand_ins() -> None:
    assert importlib.util.find_spec("mamba_ssm") is None
    assert importlib.util.find_spec("causal_conv1d") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here, and cpu_mode is off")
def test_too_late_an_installation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_mode, "_mode", None)  # as in a process that imported megatron.core before
    with pytest.raises(RuntimeError, match=r"before megatron\.core is imported"):
        cpu_mode.install()
