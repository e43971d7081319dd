"""Analyses."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.configs.option import option, refuse_wrong

#: CKA by the unbiased estimator needs so many texts.
LEAST_TEXTS = 4


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Weight change and representation similarity between pairs of checkpoints: port `analysis`. PRISM, section 10."""

    pairs: tuple[tuple[str, str], ...] = option(..., "Pairs of checkpoints, from and to.")
    thresholds: tuple[float, ...] = option(
        (0.001, 0.005, 0.01, 0.02, 0.05, 0.1), "An element has changed where |w' - w| > threshold * |w|."
    )
    problems: str = option(..., "STAGE/SET whose problem texts feed CKA.")
    source: str | None = option(None, "STAGE/SOURCE whose text feeds CKA as a control.")
    num_texts: int = option(200, "Texts for CKA, of each distribution.")

    def __post_init__(self) -> None:
        refuse_wrong(
            (not self.pairs, "pairs", "names no pair"),
            (not self.thresholds, "thresholds", "names no threshold"),
            (any(t <= 0 for t in self.thresholds), "thresholds", "must be above 0"),
            (self.num_texts < LEAST_TEXTS, "num_texts", f"must be at least {LEAST_TEXTS}"),
        )
