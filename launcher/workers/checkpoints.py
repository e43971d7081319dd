"""Hugging Face checkpoints as the workers load them: from a folder, never from a network, with clear refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.workers.devices import require_cuda


def load_model(folder: Path) -> tuple[Any, Any]:
    """Model (fp32, evaluation mode, on the GPU where there is one) and tokenizer of a folder.

    The tokenizer's end and padding tokens become the model's, whatever its generation_config.json says, so that all
    programs end a completion at the same token. Raises UserError where the folder is no whole checkpoint.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; a Hugging Face checkpoint is wanted")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {error}") from None
    # transformers fills what is missing with random numbers and only warns.
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder}: not whole: {missing[0]} and {len(missing)} tensors in all are missing")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer names no eos_token, which ends every completion")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{folder}: {len(tokenizer)} tokens in the tokenizer, {model.config.vocab_size} in the model")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval().to("cuda" if require_cuda() else "cpu"), tokenizer


def quiet() -> None:
    """Keep progress bars and notes to programmers of the libraries out of the logs."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
