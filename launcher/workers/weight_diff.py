"""Weight change between two Hugging Face checkpoints: six thresholds and the norm in one pass, tensor by tensor.

PRISM's rule: an element has changed where |w' - w| > threshold * |w|, computed in fp32 from the files. The paper is
silent on w = 0; here a zero that became anything else has changed at every threshold, as the inequality itself says.

By hand: `python -m launcher.workers.weight_diff A B [--json]`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import PrismError, UserError
from launcher.models.headers import SINGLE, Held, adapter_problem, read_config, read_header, read_index
from launcher.models.matching import harmless, notes_on
from launcher.terminal import let_output_go, plain_output

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
BY_MODULE = 0.01
#: Elements compared at a time: fewer, and the calls cost more than the work; more, and it leaves the core's cache.
_PIECE = 1 << 17
_MOST_THREADS = 8


@dataclass
class Change:
    """Sums over elements; `changed` counts one a threshold, `bits` those whose bits differ (-0 equals +0)."""

    thresholds: Sequence[float]
    elements: int = 0
    bits: int = 0
    changed: list[int] = field(default_factory=list)
    square: float = 0.0
    square_before: float = 0.0
    largest: float = 0.0

    def add(self, other: Change) -> None:
        """Add another tensor's sums."""
        self.elements += other.elements
        self.bits += other.bits
        self.changed = [a + b for a, b in zip(self.changed or [0] * len(other.changed), other.changed, strict=True)]
        self.square += other.square
        self.square_before += other.square_before
        self.largest = max(self.largest, other.largest)

    @property
    def relative_l2(self) -> float | None:
        """Norm of the change over the norm before; None where the weights before are all zero."""
        return math.sqrt(self.square / self.square_before) if self.square_before else None


def compare(before: Tensor, after: Tensor, thresholds: Sequence[float]) -> Change:
    """The change of one tensor. Raises UserError where it holds nan or infinity."""
    total = Change(thresholds, changed=[0] * len(thresholds))
    room = _Room(min(before.numel(), _PIECE))
    for old, new in zip(before.reshape(-1).split(_PIECE), after.reshape(-1).split(_PIECE), strict=True):
        if old.numel():
            total.add(room.compare(old, new, thresholds))
    return total


class _Room:
    """Buffers for one piece, used again for each: what is made of it stays near the core."""

    def __init__(self, elements: int) -> None:
        import torch

        self._old, self._step, self._bound = (torch.empty(elements) for _ in range(3))
        self._wide, self._larger = torch.empty(elements, dtype=torch.float64), torch.empty(elements, dtype=torch.bool)

    def compare(self, before: Tensor, after: Tensor, thresholds: Sequence[float]) -> Change:
        """The change of a piece. numpy's comparisons and counts take half of what torch's take on a CPU."""
        import numpy as np

        n = before.numel()
        old, new = self._old[:n].copy_(before), self._step[:n].copy_(after)
        step, size = new.sub_(old).abs_(), old.abs_()
        square, square_before = self._square(step), self._square(size)
        if not math.isfinite(square + square_before):
            raise UserError("holds nan or infinity: training diverged, or the file is damaged")
        steps, sizes, bound, larger = (x[:n].numpy() for x in (step, size, self._bound, self._larger))
        largest, bits = float(steps.max()), int(np.count_nonzero(np.greater(steps, 0, out=larger)))
        if bits < n // 8:  # as after RL: the rest has changed at no threshold
            places = np.flatnonzero(larger)
            steps, sizes, bound, larger = steps[places], sizes[places], bound[:bits], larger[:bits]
        changed, count = [0] * len(thresholds), bits
        for place in sorted(range(len(thresholds)), key=lambda i: thresholds[i]):
            if not count:  # beyond a smaller threshold, so beyond this one
                break
            np.multiply(sizes, np.float32(thresholds[place]), out=bound)
            count = changed[place] = int(np.count_nonzero(np.greater(steps, bound, out=larger)))
        return Change(thresholds, n, bits, changed, square, square_before, largest)

    def _square(self, values: Tensor) -> float:
        """The sum of squares, in float64."""
        import torch

        wide = self._wide[: len(values)].copy_(values)
        return float(torch.dot(wide, wide))


# ------------------------------------------------------------------------------------------------------------- files


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to safetensors file. Raises UserError where the folder is no checkpoint of that kind."""
    return {name: folder / held.file for name, held in _tensors(folder).items()}


def _tensors(folder: Path) -> dict[str, Held]:
    files = _weight_files(folder) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: holds no .safetensors file; a Hugging Face checkpoint is wanted")
    found: dict[str, Held] = {}
    for file in files:
        try:
            found |= read_header(file)
        except UserError as error:
            raise UserError(f"{file}: not readable as safetensors: {error}") from None
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The files of model.safetensors.index.json, or of model.safetensors; some folders hold the weights twice."""
    if index := read_index(folder):
        return sorted({folder / name for name in index.values()})
    whole = folder / SINGLE
    if not whole.is_file() and (problem := adapter_problem(folder)):
        raise UserError(problem)
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


class _Model:
    """The weights of a folder: `names` of tensors to what the files call them. `notes` tell what is left out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held = folder, _tensors(folder)
        kinds = harmless(self.held)
        left_out = {name for names in kinds.values() for name in names}
        self.names = {name: name for name in self.held if name not in left_out}
        self.notes = notes_on(kinds)
        self._opened: dict[str, safe_open] = {}

    def read(self, name: str) -> Tensor:
        """One tensor, a map of its file."""
        from safetensors import safe_open

        name = self.names[name]
        file = self.held[name].file
        if file not in self._opened:
            self._opened[file] = safe_open(self.folder / file, "pt")
        return self._opened[file].get_tensor(name)

    def drop_copy(self, other: _Model) -> None:
        """Leave output weights out that are the embedding's once more, if config.json or the other folder has it so."""
        from launcher.convert.folders import same_values

        embedding = next((name for name in self.names if _EMBEDDING.fullmatch(name)), None)
        tied = _is_tied(self.folder)
        if tied and embedding is None and _OUTPUT in self.names:
            alike = next((name for name in other.names if _EMBEDDING.fullmatch(name)), "model.embed_tokens.weight")
            self.names[alike] = self.names.pop(_OUTPUT)
            self.notes.append(f"{_OUTPUT} was taken for {alike}, to which it is tied")
        if embedding is None or _OUTPUT not in self.names or not (tied or _OUTPUT not in other.names):
            return
        if same_values(self.read(_OUTPUT), self.read(embedding)):
            self.names.pop(_OUTPUT)
            self.notes.append(f"{_OUTPUT} is a copy of {embedding}, to which it is tied: it was left out")
        elif tied:
            raise UserError(
                f"{self.folder}: {_OUTPUT} differs from {embedding}, to which config.json ties it (tie_word_embeddings)"
            )


_OUTPUT = "lm_head.weight"
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embeddings|word_embeddings|wte)\.weight")


def _is_tied(folder: Path) -> bool:
    return (folder / "config.json").is_file() and read_config(folder).get("tie_word_embeddings") is True


def read_pairs(before: Path, after: Path, tell: Callable[[str], None]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and tensors of two checkpoints, one at a time. Raises UserError with every tensor that has no match.

    `tell` is given what is left out.
    """
    ours, theirs = models = _Model(before), _Model(after)
    ours.drop_copy(theirs)
    theirs.drop_copy(ours)
    for note in [f"{model.folder}: {note}" for model in models for note in model.notes]:
        tell(note)
    only = {before: sorted(set(ours.names) - set(theirs.names)), after: sorted(set(theirs.names) - set(ours.names))}
    problems = [
        f"{folder}: {names[0]} and {len(names)} in all are not in the other" for folder, names in only.items() if names
    ]
    if problems:
        raise UserError([*problems, "the two are not checkpoints of one model"])
    for name in sorted(ours.names):
        old, new = ours.read(name), theirs.read(name)
        if old.shape != new.shape:
            raise UserError(f"{name}: {[*old.shape]} in {before}, {[*new.shape]} in {after}; not one model")
        yield name, old, new


#: Modules by the first pattern that a tensor's name matches.
_MODULES = (
    ("norm", r"norm"),
    ("embedding", r"embed"),
    ("lm_head", r"lm_head"),
    ("mamba", r"in_proj|out_proj|conv1d|A_log|dt_bias|mixer\.D$|mamba"),
    ("attention", r"[qkvo]_proj|attn"),
    ("mlp", r"mlp|gate_proj|up_proj|down_proj|input_linear|output_linear"),
)


def describe(name: str) -> tuple[int | None, str]:
    """Layer and module of a tensor, by its name in Hugging Face files."""
    layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    module = next((module for module, pattern in _MODULES if re.search(pattern, name)), "other")
    return (int(layer[1]) if layer else None), module


def weight_change(
    before: Path,
    after: Path,
    thresholds: Sequence[float] = THRESHOLDS,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Change, dict[tuple[int | None, str], Change]]:
    """The change of the whole model, and by (layer, module): some tensors at a time, added up in their order.

    `tell` is given a line for each kind of tensors that are left out of one of the folders.
    """
    whole = Change(thresholds, changed=[0] * len(thresholds))
    parts: dict[tuple[int | None, str], Change] = {}

    def one(pair: tuple[str, Tensor, Tensor]) -> tuple[str, Change]:
        name, old, new = pair
        try:
            return name, compare(old, new, thresholds)
        except UserError as error:
            raise UserError(f"{name} in {before} or {after}: {error}") from None

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS)) as pool:
        try:
            for name, change in pool.map(one, read_pairs(before, after, tell)):  # what is read is a map of the files
                whole.add(change)
                parts.setdefault(describe(name), Change(thresholds, changed=[0] * len(thresholds))).add(change)
        finally:
            pool.shutdown(cancel_futures=True)
    return whole, parts


def rows(whole: Change, head: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a threshold."""
    return [
        {
            **head,
            "threshold": threshold,
            "changed_fraction": count / whole.elements,
            "relative_l2": whole.relative_l2,
            "elements": whole.elements,
            "bits_changed_fraction": whole.bits / whole.elements,
            "largest_change": whole.largest,
        }
        for threshold, count in zip(whole.thresholds, whole.changed, strict=True)
    ]


def module_rows(parts: dict[tuple[int | None, str], Change], head: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every layer and module, at the threshold nearest to PRISM's 1 %."""
    found: list[dict[str, Any]] = []
    for (layer, module), change in sorted(parts.items(), key=lambda item: (item[0][0] is None, item[0])):
        nearest = min(change.thresholds, key=lambda t: abs(t - BY_MODULE))
        found += [
            row for row in rows(change, {**head, "layer": layer, "module": module}) if row["threshold"] == nearest
        ]
    return found


# ----------------------------------------------------------------------------------------------------------- by hand


def main(argv: Sequence[str] | None = None) -> int:
    """`weight_diff A B [--json]`."""
    parser = argparse.ArgumentParser(prog="prism-launch diff", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    notes: list[str] = []
    whole, parts = weight_change(args.before, args.after, tell=notes.append)
    head = {"from": str(args.before), "to": str(args.after)}
    if args.json:
        body = {"weights": rows(whole, head), "weights_by_module": module_rows(parts, head)}
        print(json.dumps({**body, **({"notes": notes} if notes else {})}, indent=2))
        return 0
    for note in notes:
        print(note)
    _print(rows(whole, {}), module_rows(parts, {}))
    return 0


def _print(weights: Iterable[dict[str, Any]], modules: Iterable[dict[str, Any]]) -> None:
    first, *_ = weights = list(weights)
    print(f"{first['elements']} elements, relative L2 {first['relative_l2'] or 0:.3g}")
    print(f"  changed in any bit: {first['bits_changed_fraction']:.2%}")
    for row in weights:
        print(f"  changed by more than {row['threshold']:.1%}: {row['changed_fraction']:.2%}")
    print(f"by layer and module, more than {BY_MODULE:.0%}:")
    for row in modules:
        layer = "-" if row["layer"] is None else row["layer"]
        print(f"  {layer:>4} {row['module']:<10} {row['changed_fraction']:8.2%}  L2 {row['relative_l2'] or 0:.3g}")


def run_by_hand(program: Callable[[], int]) -> int:
    """Run a program of this package from the command line; a user's mistake is text and exit code 2."""
    with plain_output():
        return _run_by_hand(program)


def _run_by_hand(program: Callable[[], int]) -> int:
    try:
        code = program()
        sys.stdout.flush()
        return code
    except PrismError as error:
        print(f"prism-launch: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        let_output_go()
        return 0
    except OSError as error:
        print(f"prism-launch: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return 2 if isinstance(error, PermissionError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run_by_hand(main))
