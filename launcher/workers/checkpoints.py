"""Hugging Face checkpoints as the workers load them: from a folder, never from a network, with clear refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launcher.errors import UserError


def load_model(folder: Path) -> tuple[Any, Any]:
    """Model (fp32, evaluation mode) and tokenizer of a folder. Raises UserError where it is no checkpoint."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; a Hugging Face checkpoint is wanted")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {error}") from None
    return model.eval(), tokenizer


def quiet() -> None:
    """Keep progress bars and warnings of the libraries out of the logs."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
