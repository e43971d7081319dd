"""Megatron-LM's half of `test_megatron_lm.py`, in its own process: its parser, builders, load, save. Not a test.

    python mlm_side.py load CHECKOUT OUT pretrain_gpt.py ARGUMENTS...     OUT: weights and logits after --load
    python mlm_side.py train CHECKOUT OUT pretrain_gpt.py ARGUMENTS...    and after one step, which is saved in --save

Standing in: CPU mode (`launcher.workers.megatron.cpu_mode`) and Transformer Engine's modules (`te_stand_ins`).
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any


def main(verb: str, checkout: str, out: str, script: str, *words: str) -> None:
    """Build the model as `script` does, load, and write what it then holds."""
    import te_stand_ins

    te_stand_ins.install()
    sys.path.insert(0, checkout)
    sys.argv = [script, *words]
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import initialize
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.training import setup_model_and_optimizer
    from model_provider import model_provider

    kind = "gpt" if script == "pretrain_gpt.py" else "mamba"
    builder = getattr(importlib.import_module(f"{kind}_builders"), f"{kind}_builder")
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9)  # asked for the age of the GPU
    initialize._compile_dependencies = lambda: None  # with make and nvcc; the wheel of megatron-core has what is needed
    initialize.initialize_megatron(allow_no_cuda=True)
    models, optimizer, scheduler = setup_model_and_optimizer(
        functools.partial(model_provider, builder), ModelType.encoder_or_decoder
    )
    if verb == "train":
        tokens = torch.arange(32).view(1, 32) % 7
        models[0](tokens, torch.arange(32)[None], None, labels=tokens).mean().backward()
        models[0].finish_grad_sync()
        scheduler.step(1)  # the rate of the very first step is 0
        done, *_ = optimizer.step()
        assert done
        save_checkpoint(7, models, optimizer, scheduler, 0)
    _write(Path(out), models[0])


def _write(out: Path, model: Any) -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.utils import unwrap_model
    from safetensors.torch import save_file

    model.eval()
    bare = unwrap_model(model)
    tokens = torch.load(os.environ["MLM_TOKENS"])
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1]).expand(*tokens.shape), None)
        logits = gather_from_tensor_model_parallel_region(logits).float()
    held = {n: t.detach().contiguous().clone() for n, t in bare.state_dict().items() if isinstance(t, torch.Tensor)}
    save_file(held, out.with_suffix(f".{parallel_state.get_tensor_model_parallel_rank()}.safetensors"))
    if torch.distributed.get_rank() == 0:
        torch.save(logits, out.with_suffix(".logits"))


if __name__ == "__main__":
    main(*sys.argv[1:])
