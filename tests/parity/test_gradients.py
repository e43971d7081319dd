"""The same batch through transformers and through the trainer's model: the same loss, and the same gradient of every
weight, seen as what one step of gradient descent at rate 1 makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from real_models import REAL
from safetensors.torch import load_file
from test_logits import tokens
from torch import Tensor

from launcher.convert.conversion import convert
from launcher.models.families import shape_of

pytestmark = pytest.mark.usefixtures("megatron")

#: Largest difference over the largest gradient of the same tensor; 2e-5 seen.
TOLERANCE = 1e-3


def hf_gradients(folder: Path, ids: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name of transformers' model, without its lower bound of Mamba's dt."""
    from launcher.workers.checkpoints import load_model

    model, _ = load_model(folder)
    model.train().requires_grad_(True)
    for layer in model.model.layers:
        if hasattr(getattr(layer, "mixer", None), "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    loss.backward()
    before = load_file(folder / "model.safetensors")
    stepped = {id(p): p.detach() - p.grad for p in model.parameters() if p.grad is not None}
    by_tensor = {p.data_ptr(): id(p) for p in model.parameters()}
    state = {
        name: stepped[by_tensor[t.data_ptr()]] for name, t in model.state_dict().items() if t.data_ptr() in by_tensor
    }
    names = {name: next(n for n in state if _same(n, name)) for name in before}
    return float(loss), {name: before[name] - state[names[name]] for name in before}


def _same(ours: str, theirs: str) -> bool:
    """Nemotron-H's files say `backbone.` where transformers' module says `model.`."""
    return ours.replace("model.", "", 1) == theirs.replace("backbone.", "", 1).replace("model.", "", 1)


def megatron_gradients(source: Path, folder: Path, ids: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The same of the trainer's model: a step is taken, and its weights converted back."""
    from launcher.workers.megatron import checkpoint
    from launcher.workers.megatron.model import build_model

    for name in ("before", "after", "hf"):
        (folder / name).mkdir()
    convert(source, folder / "before", "megatron")
    shape = shape_of(json.loads((source / "config.json").read_text()))
    model = build_model(shape).train()
    checkpoint.load_weights(folder / "before", model)
    losses = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None, labels=labels)
    losses.mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    checkpoint.save_weights(folder / "after", 1, model)
    (folder / "before" / "hf").rename(folder / "after" / "hf")
    convert(folder / "after", folder / "hf", "hf")
    before, after = load_file(source / "model.safetensors"), load_file(folder / "hf" / "model.safetensors")
    return float(losses.mean()), {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize("name", REAL)
def test_loss_and_gradients_are_those_of_transformers(
    name: str, hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    both = tokens(name)
    ids, labels = both[:, :-1].contiguous(), both[:, 1:].contiguous()
    theirs_loss, theirs = hf_gradients(hf_checkpoint(name), ids, labels)
    ours_loss, ours = megatron_gradients(hf_checkpoint(name), tmp_path, ids, labels)
    assert ours_loss == pytest.approx(theirs_loss, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for tensor, gradient in theirs.items():
        largest = gradient.abs().max()
        assert largest > 0, f"{tensor} has no gradient"
        assert (ours[tensor] - gradient).abs().max() <= TOLERANCE * largest + 1e-6, tensor
