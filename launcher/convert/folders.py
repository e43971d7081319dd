"""What surrounds a checkpoint's tensors: which format it is, its config, the files carried along."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from launcher.convert import nemo
from launcher.convert.entry import Entry, raw_bytes
from launcher.convert.hf import HfReader
from launcher.convert.torch_dist import TorchDistReader
from launcher.errors import UserError, listed
from launcher.models import headers
from launcher.models.checkpoints import CARRIED, carried_in, format_of, look_at, weights_in
from launcher.models.formats import Format, tensors_of
from launcher.models.headers import Held
from launcher.models.matching import match
from launcher.models.shape import ModelShape
from launcher.models.side_files import TEMPLATES, is_side_file
from launcher.models.spans import Files, Span, directly_in
from launcher.models.torch_dist import check_backend, checkpoint_dir


class Reader(Protocol):
    """Named tensors in files; `where` is their folder in messages. `entries` are those that can be read."""

    where: Path
    entries: dict[str, Entry]

    @property
    def held(self) -> Mapping[str, Held]:
        """All tensors."""

    @property
    def paths(self) -> Sequence[Path]:
        """The files that hold them."""

    def read(self, name: str) -> Tensor:
        """One tensor."""

    def read_together(self, names: Sequence[str]) -> list[Tensor]:
        """Several tensors of one type."""


class Writer(Protocol):
    """Takes named tensors, each once; of `lanes` threads each has its own number."""

    @property
    def lanes(self) -> int:
        """How many threads may add tensors at once."""

    def add(self, name: str, tensor: Tensor, lane: int = 0) -> None:
        """Write one tensor."""

    def stop(self) -> None:
        """Close the files as they are."""

    def close(self) -> None:
        """Finish the files. Raises RuntimeError where a tensor was never given."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to read: `config` is its config.json as read, `side` the files carried along, by name.

    `notes` tell what of its files is left out.
    """

    format: Format
    where: Path
    config: dict[str, object]
    shape: ModelShape
    side: Files
    reader: Reader
    notes: tuple[str, ...] = ()


def open_checkpoint(path: Path, config_folder: Path | None = None) -> Checkpoint:
    """Read what there is of a checkpoint but its tensors.

    `config_folder`: a folder with config.json and tokenizer, for a checkpoint that has none. Raises UserError.
    """
    name, files = look_at(path)
    if config_folder is not None and not config_folder.is_dir():
        raise UserError(f"--config: {config_folder}: no such folder")
    side = (
        _side(files, CARRIED if name != "hf" else "")
        if config_folder is None
        else _side(directly_in(config_folder, TEMPLATES))
    )
    where = config_folder or (path if name == "hf" else path / CARRIED)
    if "config.json" not in side and name != "hf" and config_folder is None:
        mend = "put the model's there, or name a folder that has it with --config"
        raise UserError(f"{path}: no {CARRIED}/config.json in it; {mend}")
    config, shape = read_config(side, where)
    if name == "nemo" and nemo.CONFIG in files:
        span = files[nemo.CONFIG]
        nemo.check_config(span.read().decode(errors="replace"), str(span), shape)
    return Checkpoint(name, path, config, shape, side, _reader(name, path, files))


def model_alone(found: Checkpoint) -> Checkpoint:
    """The checkpoint with the model's tensors alone, under the model's names. Raises UserError where one is missing or
    does not fit, and for a tensor beside them that could be another model's."""
    fit = match(found.reader.held, found.shape, found.format, found.reader.where, found.config)
    if fit.copy:
        _check_copy(found.reader, *fit.copy, found.shape.vocab_size)
    notes = (*fit.notes, *_other_files(found))
    return replace(found, reader=_Model(found.reader, fit.names), notes=notes)


def _other_files(found: Checkpoint) -> list[str]:
    """A note on files of tensors in a Hugging Face folder that are none of the model's."""
    read = {path.name for path in found.reader.paths}
    others = sorted(p.name for p in found.where.glob("*.safetensors") if p.name not in read)
    return [f"files of tensors beside the model were not read: {listed(others)}"] if others else []


def _check_copy(reader: Reader, copy: str, original: str, rows: int) -> None:
    """Raise UserError where a second output weight is another one; padding rows do not count."""
    if not same_values(*(reader.read(name)[:rows] for name in (copy, original))):
        raise UserError(
            f"{reader.where}: {copy} differs from {original}, to which config.json ties it (tie_word_embeddings); set "
            f"that to false if the model has output weights of its own, or take {copy} out"
        )


def check_beside(folder: Path) -> tuple[str, ...]:
    """Raise UserError where a whole checkpoint has tensors that the library which loads it would drop, and that could
    be another model's.

    Returns notes on what is dropped without harm. Families and settings that are not covered here are passed over, as
    is what is not whole: the library says so itself.
    """
    try:
        config, shape = read_config(_side(directly_in(carried_in(folder))), carried_in(folder))
        form = format_of(folder)
        reader = _reader(form, folder, {})
    except UserError:
        return ()
    held = reader.held
    whole = all(name in held and held[name].shape in fit for name, fit in tensors_of(shape, form).items())
    if "quantization_config" in config or not whole:
        return ()
    return model_alone(Checkpoint(form, folder, config, shape, {}, reader)).notes


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes, or in different types the same values."""
    return raw_bytes(a) == raw_bytes(b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


class _Model:
    """A reader's tensors under the model's names, without what lies beside them."""

    def __init__(self, reader: Reader, names: Mapping[str, str]):
        self.where, self.paths, self._reader, self._names = reader.where, reader.paths, reader, names
        self.held = {name: reader.held[held] for name, held in names.items()}
        self.entries = {name: reader.entries[held] for name, held in names.items()}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._reader.read(self._names[name])

    def read_together(self, names: Sequence[str]) -> list[Tensor]:
        """Several tensors of one type."""
        return self._reader.read_together([self._names[name] for name in names])


def _reader(name: Format, path: Path, files: Files) -> Reader:
    if name == "hf":
        return HfReader(path)
    if name == "megatron":
        folder = checkpoint_dir(path)
        return TorchDistReader(folder, directly_in(folder))
    where, weights = weights_in(path, files)
    check_backend(where, weights)
    return TorchDistReader(where, weights, nemo.PREFIX)


def read_config(side: Files, where: Path) -> tuple[dict[str, object], ModelShape]:
    """config.json and the model that it describes; `where` is its folder in messages. Raises UserError."""
    path = where / "config.json"
    if "config.json" not in side:
        raise UserError(f"{path}: No such file or directory; put the model's config.json there")
    config = headers.parse_config(side["config.json"].read(headers.MOST_CONFIG + 1), path)
    return config, headers.shape_in(config, path)


def _side(files: Files, folder: str = "") -> Files:
    prefix = f"{folder}/" if folder else ""
    names = {n.removeprefix(prefix): s for n, s in files.items() if n.startswith(prefix)}
    return {n: s for n, s in names.items() if is_side_file(n)}


def copy_side_files(side: Files, target: Path) -> list[str]:
    """Write config, generation config and tokenizer; returns their names."""
    target.mkdir(exist_ok=True)
    for name, span in side.items():
        (target / name).parent.mkdir(exist_ok=True)
        _copy(span, target / name)
    return sorted(side)


def _copy(span: Span, target: Path) -> None:
    if target.suffix == ".json":  # with a byte-order mark no other program reads it
        target.write_bytes(span.read().removeprefix(codecs.BOM_UTF8))
        return
    with span.path.open("rb") as source, target.open("wb") as file:
        source.seek(span.start)
        left = span.size
        while left and (data := source.read(min(left, 1 << 20))):
            file.write(data)
            left -= len(data)
