"""`prism-launch convert SRC DST --to hf|megatron`: a checkpoint in the other format, verified."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import PrismError


def main(argv: Sequence[str] | None = None) -> int:
    """Convert by hand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="prism-launch convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--to", required=True, choices=["hf", "megatron"])
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        _print(args.target, run(args.source, args.target, args.to, not args.no_verify), args.json)
    except PrismError as error:
        for line in str(error).splitlines():
            print(f"prism-launch: {line}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"prism-launch: {error.filename or args.target}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(source: Path, target: Path, to: Any, verify: bool = True) -> dict[str, Any]:
    """Convert into a new folder, whole or not at all; returns the verification. Raises UserError, WorldError."""
    from launcher.convert.conversion import convert
    from launcher.convert.folders import new_folder

    with new_folder(target) as partial:
        return convert(source, partial, to, verify)


def _print(target: Path, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, indent=2))
        return
    read, written = record["tensors_read"], record["tensors_written"]
    print(f"{target}: {read} tensors read, {written} written, {record['bytes_written'] / 1e6:.1f} MB")
    checked = "each tensor read back and converted back has the source's bytes"
    print(f"round trip: {record['round_trip']}{'; ' + checked if record['source_sha256'] else ' (--no-verify)'}")


if __name__ == "__main__":
    sys.exit(main())
