"""One conversion: check that source and model fit, move the tensors, read the written files back and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from launcher.convert import nemo, run_config
from launcher.convert.entry import Entry
from launcher.convert.files import Member, in_folder, leave_cache, pack
from launcher.convert.folders import Checkpoint, Reader, Writer, copy_side_files, model_alone, open_checkpoint
from launcher.convert.hf import HfReader, HfWriter
from launcher.convert.links import Link, links
from launcher.convert.moving import Job, Progress, check_written, target_entries
from launcher.convert.target import ARCHIVE, check_room
from launcher.convert.torch_dist import (
    RELEASE_COMMON,
    TorchDistReader,
    TorchDistWriter,
    extra_states,
)
from launcher.errors import UserError, bounded
from launcher.models.checkpoints import CARRIED
from launcher.models.formats import Format
from launcher.models.shape import ModelShape
from launcher.models.spans import in_tar
from launcher.models.torch_dist import RELEASE, TRACKER

#: Bytes beside a tensor's own in any format, at most, and of the files around them.
_TENSOR_OVERHEAD, _FOLDER_OVERHEAD = 4096, 64 << 20


def convert(
    source: Path,
    target: Path,
    to: Format,
    verify: bool = True,
    progress: Progress = lambda *_: None,
    *,
    config: Path | None = None,
    fold: bool = False,
    final: Path | None = None,
) -> dict[str, Any]:
    """Fill the empty folder `target` with the checkpoint `source` in the format `to`; returns the verification.

    `config`: a folder with config.json and tokenizer, for a source that carries none. `fold`: put Granite's
    multipliers into the weights of a `nemo` checkpoint. `final`: where the checkpoint will lie, `target` by default;
    where that ends in .nemo, an archive of that name is made inside `target`. Raises UserError where the source is
    no checkpoint that can be converted, before anything is written, and WorldError where the disk has no room or what
    was written is not what was read.
    """
    found = open_checkpoint(source, config)
    if found.format == to:
        raise UserError(f"{source}: is in format {to} already")
    folded = _folded(found, to, fold)
    in_source = len(found.reader.held)
    found = model_alone(found)
    table = links(found.shape, found.format, to, folded)
    _check_types(found.reader, table, folded if to == "nemo" else None)
    wanted = target_entries(found.reader, table)
    final = (final or target).absolute()
    archive = target / final.name if to == "nemo" and final.suffix == ARCHIVE else None
    check_room(target, sum(e.nbytes + _TENSOR_OVERHEAD for e in wanted.values()) + _FOLDER_OVERHEAD)
    writer = _writer(target, to, wanted, found, archive)
    files = _write_around(target, to, found, wanted, final)
    job = Job(table, found.reader, progress, verify)
    job.move(writer)
    if archive:
        pack(target, archive)
    if verify:
        leave_cache(target)
    written = _written(target, to, archive)
    check_written(written, wanted)
    exact = folded is None or to == "nemo"
    if verify:
        job.compare(written, exact)
    return {**_record(found, to, written, job, files), "tensors_in_source": in_source}


def _folded(found: Checkpoint, to: Format, fold: bool) -> torch.dtype | None:
    """The type of the weights that Granite's multipliers are in or go into; None where they are not."""
    if to == "nemo":
        nemo.refuse(found.shape, fold)
    elif fold:
        raise UserError(f"--fold-multipliers: is for --to nemo, not for {to}")
    if "nemo" not in (to, found.format) or found.shape.family != "granite":
        return None
    name = str(found.config.get("dtype") or found.config.get("torch_dtype") or "bfloat16")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _check_types(reader: Reader, table: Sequence[Link], exact: torch.dtype | None) -> None:
    """One type within each row of the table; only `exact` where that is what comes back from folded weights."""
    problems = []
    for link in table:
        types = {reader.entries[name].dtype for name in link.sources}
        if len(types) > 1:
            listed = ", ".join(sorted(map(str, types)))
            problems.append(f"{reader.where}: {', '.join(link.sources)} differ in type: {listed}")
        elif exact in (torch.bfloat16, torch.float16, torch.float32) and (types != {exact} or exact is torch.float32):
            problems.append(
                f"{reader.where}: {link.sources[0]} is of type {types.pop()}; multipliers can be taken out again with "
                "every bit only of weights in 16 bits of the type that config.json names"
            )
    if len({n for link in table for n in link.sources}) != sum(len(link.sources) for link in table):
        raise RuntimeError("the family's table uses a tensor twice")
    if problems:
        raise UserError(bounded(problems, reader.where))


# ------------------------------------------------------------------------------------------------------------ formats


def _writer(target: Path, to: Format, wanted: Mapping[str, Entry], found: Checkpoint, archive: Path | None) -> Writer:
    if to == "hf":
        return HfWriter(target, wanted)
    data = Member(archive, f"{nemo.WEIGHTS}/{TorchDistWriter.ONE_FILE}") if archive else None
    try:
        return torch_dist_writer(target, to, wanted, found.shape, data)
    except UserError as error:
        raise UserError(f"{found.reader.where}: {problem}" for problem in error.problems) from None


def torch_dist_writer(
    target: Path, to: Format, wanted: Mapping[str, Entry], shape: ModelShape, data: Member | None = None
) -> TorchDistWriter:
    """Where the tensors of a checkpoint of format `megatron` or `nemo` go; `data`: all into that file."""
    folder, prefix, common = (
        (target / RELEASE, "", RELEASE_COMMON) if to == "megatron" else (target / nemo.WEIGHTS, nemo.PREFIX, {})
    )
    stacked = shape.hybrid_override_pattern is None
    return TorchDistWriter(
        folder, wanted, stacked=stacked, prefix=prefix, objects=extra_states(shape), common=common, data=data
    )


def _write_around(target: Path, to: Format, found: Checkpoint, wanted: Mapping[str, Entry], final: Path) -> list[str]:
    """The files beside the tensors; returns the names of those carried along."""
    if to == "megatron":
        (target / TRACKER).write_text(RELEASE, encoding="utf-8")
        weights = wanted["embedding.word_embeddings.weight"].dtype
        run_config.write(target / RELEASE, found.shape, weights, found.config)
    if to == "nemo":
        import yaml

        spread = found.config.get("initializer_range")
        config = nemo.model_config(found.shape, final / CARRIED, spread if isinstance(spread, float) else 0.02)
        (target / nemo.CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return copy_side_files(found.side, target if to == "hf" else target / CARRIED)


def _written(target: Path, to: Format, archive: Path | None) -> Reader:
    if to == "hf":
        return HfReader(target)
    if to == "megatron":
        return TorchDistReader(target / RELEASE, in_folder(target / RELEASE))
    files, inside = (in_tar(archive) if archive else in_folder(target)), f"{nemo.WEIGHTS}/"
    weights = {n.removeprefix(inside): s for n, s in files.items() if n.startswith(inside)}
    return TorchDistReader(target / nemo.WEIGHTS, weights, nemo.PREFIX)


# -------------------------------------------------------------------------------------------------------------- record


def digest_of(sums: Mapping[str, str]) -> str:
    """One SHA-256 over the names and checksums of all tensors."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(sums.items())).encode()).hexdigest()


def _record(found: Checkpoint, to: Format, written: Reader, job: Job, files: list[str]) -> dict[str, Any]:
    checked = ("rounded" if job.rounded else "bit-exact") if job.verify else "not run"
    folded = any(link.dtype is not None for link in job.table)
    notes = [*found.notes, *([_FOLDED] if folded and to == "nemo" else [_unfolded(job)] if folded else [])]
    return {
        "from": found.format,
        "to": to,
        "family": found.shape.family,
        "tensors_read": sum(len(link.sources) for link in job.table),
        "tensors_in_source": len(found.reader.entries),
        "tensors_written": len(written.entries),
        "bytes_written": sum(e.nbytes for e in written.entries.values()),
        "types": sorted({str(e.dtype).removeprefix("torch.") for e in written.entries.values()}),
        "files": files,
        "round_trip": checked,
        "source_sha256": digest_of(job.source_sums) if job.verify else None,
        "not_finite": sorted(job.not_finite) if job.verify else None,
        "notes": notes,
        "seconds": {name: round(value, 3) for name, value in job.seconds.items()},
        "versions": {"torch": torch.__version__, "safetensors": version("safetensors")},
    }


_FOLDED = (
    "Granite's multipliers are in the weights, which are in fp32 and take twice the room. Not for training: under Adam "
    "a weight that is c times as large learns 1/c as fast, and the norm that gradients are clipped by changes."
)


def _unfolded(job: Job) -> str:
    """What became of weights that carried Granite's multipliers: those of a training are not multiples of 16 bits."""
    if not job.verify:
        kept = "whether that lost anything was not looked at"
    elif job.rounded:
        kept = f"{len(job.rounded)} of {len(job.source_sums)} tensors have lost bits by that"
    else:
        kept = "put in again they give every byte of the source"
    return f"Granite's multipliers were taken out of the weights, which are rounded to config.json's type: {kept}."
