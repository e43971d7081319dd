"""`prism-launch convert SRC DST --to FORMAT` and `prism-launch merge A B`: checkpoints by hand, verified."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.errors import PrismError, UserError
from launcher.terminal import let_output_go, plain_output, raw

if TYPE_CHECKING:
    from launcher.models.formats import Format

#: The verification of a conversion by hand, beside what it made.
RECORD = "conversion.json"
_NO_PARITY = "--parity: compares formats hf and megatron; of nemo there is no model here to compare with"


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or merge by hand; returns the exit code."""
    # Large tensors come and go: in pages of 2 MiB that takes the kernel much less. torch looks when it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    words = list(sys.argv[1:] if argv is None else argv)
    merging = words[:1] == ["merge"]
    args = _parse_merge(words[1:]) if merging else _parse_convert(words)
    try:
        record = _merge(args) if merging else _convert(args)
        _print(args.target, record, args.json)
        sys.stdout.flush()
    except BrokenPipeError:
        let_output_go()
    except PrismError as error:
        for line in str(error).splitlines():
            print(f"prism-launch: {line}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        mend = "; free some room, then run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"prism-launch: {error.filename or args.target}: {error.strerror or error}{mend}", file=sys.stderr)
        return 2 if isinstance(error, PermissionError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parse_convert(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prism-launch convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--to", required=True, choices=["hf", "megatron", "nemo"])
    parser.add_argument("--config", metavar="DIR", type=Path)
    parser.add_argument("--fold-multipliers", action="store_true")
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def _parse_merge(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prism-launch merge", description="A linear combination of checkpoints.")
    parser.add_argument("sources", metavar="CHECKPOINT", type=Path, nargs="+")
    parser.add_argument("--weights", required=True)
    parser.add_argument("-o", "--output", metavar="DST", type=Path, required=True, dest="target")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    return run(
        args.source,
        args.target,
        args.to,
        not args.no_verify,
        config=args.config,
        fold=args.fold_multipliers,
        parity=args.parity,
        progress=show_progress(),
    )


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from launcher.convert.merge import merge
    from launcher.convert.target import new_folder

    try:
        weights = [float(word) for word in args.weights.split(",")]
        if not all(map(math.isfinite, weights)):
            raise ValueError
    except ValueError:
        raise UserError(f"--weights: {args.weights} is not numbers with commas between them") from None
    with new_folder(args.target, None, args.sources) as partial:
        record = merge(args.sources, weights, partial, not args.no_verify, show_progress())
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def run(
    source: Path,
    target: Path,
    to: Format,
    verify: bool = True,
    *,
    config: Path | None = None,
    fold: bool = False,
    parity: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Convert into a new folder, whole or not at all; returns the verification. Raises UserError, WorldError."""
    from launcher.convert.conversion import convert
    from launcher.convert.target import new_folder

    target = Path(os.path.abspath(target))
    if parity and to == "nemo":
        raise UserError(_NO_PARITY)
    with new_folder(target, to, [source]) as partial:
        record = convert(source, partial, to, verify, progress, config=config, fold=fold, final=target)
        if parity:
            record["parity"] = _parity(source, partial, record, config)
        if not (partial / target.name).is_file():  # an archive has no place for it
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _parity(source: Path, target: Path, record: dict[str, Any], config: Path | None) -> dict[str, Any]:
    from launcher.convert.parity import compare
    from launcher.workers.checkpoints import quiet

    quiet()
    if {record["from"], record["to"]} != {"hf", "megatron"}:
        raise UserError(_NO_PARITY)
    return compare(source, target, config) if record["to"] == "megatron" else compare(target, source)


def show_progress() -> Callable[[int, int], None]:
    """Tells on stderr how far it is: a line that changes on a terminal, else a line each ten seconds."""
    terminal = sys.stderr.isatty()
    began, last = time.monotonic(), [time.monotonic()]

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if now - last[0] < (0.5 if terminal else 10) and not (terminal and done == total):
            return
        last[0] = now
        end = "\n" if done == total or not terminal else ""
        text = ("\r" if terminal else "") + progress_text(done, total, now - began)
        print(text, end=end, file=raw(sys.stderr), flush=True)

    return show


def progress_text(done: int, total: int, seconds: float) -> str:
    """Bytes, rate and time left."""
    rate = done / seconds if seconds > 0 else 0.0
    left = f"{(total - done) / rate:.0f} s left" if rate else "starting"
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:<14}"


def _print(target: Path, record: dict[str, Any], as_json: bool) -> None:
    for name in record["not_finite"] or ():
        print(f"prism-launch: warning: {name} holds nan or infinity, which is kept", file=sys.stderr)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    read, written = record["tensors_read"], record["tensors_written"]
    print(f"{target}: {read} tensors read, {written} written, {record['bytes_written'] / 1e6:.1f} MB")
    if "read_back" in record:
        print("\n".join([f"read back: {record['read_back']}", *record["notes"]]))
        return
    checked = {
        "bit-exact": "; each tensor read back and converted back has the source's bytes",
        "rounded": "; each tensor read back is what was to be written",
        "not run": " (--no-verify)",
    }[record["round_trip"]]
    print(f"round trip: {record['round_trip']}{checked}")
    for note in record["notes"]:
        print(note)
    if "parity" in record:
        found = record["parity"]
        print(
            f"parity: largest difference {found['largest_relative_difference']:.1e} of the largest logit, "
            f"top-1 agreement {found['top1_agreement']:.1%}{'; ' + found['dt_clamp'] if 'dt_clamp' in found else ''}"
        )


def _stop(number: int, _: object) -> NoReturn:
    """Take leave as after Ctrl-C, so that nothing half-written stays."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    with plain_output():
        sys.exit(main())
