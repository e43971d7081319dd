"""Megatron-Bridge's half of `test_bridge.py`, in its own environment. Not a test.

    python bridge_side.py export HF CHECKPOINT OUT     AutoBridge: load CHECKPOINT, write OUT in Hugging Face's format
    python bridge_side.py import HF OUT                AutoBridge.import_ckpt

Standing in: CPU mode (`launcher.workers.megatron.cpu_mode`), Transformer Engine's modules (`te_stand_ins`), and empty
packages for what Bridge imports for training and quantization.
"""

from __future__ import annotations

import sys
import typing
from typing import Any

_EMPTY = (
    "modelopt",
    "nvidia_resiliency_ext",
    "datasets",
    "wandb",
    "mlflow",
    "PIL",
    "qwen_vl_utils",
    "megatron.energon",
)


def main(verb: str, hf: str, *paths: str) -> None:
    """Do as the words say."""
    import te_stand_ins
    import typing_extensions

    if sys.version_info < (3, 12):
        typing.override = typing_extensions.override  # Bridge 0.4 and newer say that they want Python 3.12
    te_stand_ins.install(*_EMPTY)
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training import checkpointing
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    get_cuda_rng_tracker().add("model-parallel-rng", 1)  # Bridge does so where there is CUDA
    for name in ("restore_modelopt_state", "save_modelopt_state", "save_sharded_modelopt_state"):
        setattr(checkpointing, name, lambda *_: None)
    torch.set_num_threads(1)
    remote: dict[str, Any] = {"trust_remote_code": True}  # a Nemotron-H that carries its config's class
    if verb == "export":
        bridge = AutoBridge.from_hf_pretrained(hf, **remote)
        bridge.export_ckpt(*paths, show_progress=False, strict=True)
    else:
        with temporary_distributed_context("gloo"):  # it would take NCCL
            AutoBridge.import_ckpt(hf, *paths, **remote)


if __name__ == "__main__":
    main(*sys.argv[1:])
