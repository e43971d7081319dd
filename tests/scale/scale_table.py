"""What a save takes at scales that no test reaches: the table of docs/training.md, from `launcher.fit.saving`.

python tests/scale/scale_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real_models import REAL

from launcher.fit.layers import architecture_of, rank_parameters
from launcher.fit.memory import Layout
from launcher.fit.saving import saving_of
from launcher.models.families import shape_of

GPUS = (64, 128, 256, 512, 1024)
#: Tensor and pipeline parallel sizes that fit on GPUs of 80 GB.
LAYOUTS = {"Mistral-Small-24B-Base-2501": (4, 2), "granite-4.0-micro-base": (1, 1), "granite-4.0-h-micro-base": (1, 1)}
USUAL = (2, 1)


def rows() -> list[list[str]]:
    """A row a model."""
    found = []
    for name, config in REAL.items():
        tp, pp = LAYOUTS.get(name, USUAL)
        a = architecture_of(shape_of(config))
        savings = [saving_of(a, Layout(gpus=gpus, tp=tp, pp=pp)) for gpus in GPUS]
        shard = max(rank_parameters(a, tp, pp, stage) for stage in range(pp))
        layout = f"TP {tp}" + (f", PP {pp}" if pp > 1 else "")
        found.append(
            [
                name,
                layout,
                f"{savings[0].total_bytes / 1e9:.0f}",
                *(
                    f"{s.rank_bytes / 1e6:.0f} · {s.host_bytes / 2**30:.1f} · {s.index_bytes / 1e6:.1f}"
                    for s in savings
                ),
                f"{8 * 12 * shard / 2**30:.0f}",
            ]
        )
    return found


def table() -> str:
    """The table in Markdown."""
    head = ["model", "layout", "GB a save", *(f"{gpus} GPUs" for gpus in GPUS), "gathered: GiB a node"]
    lines = [head, ["---"] * len(head), *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
