"""Training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.configs.model import ModelConfig
from launcher.configs.option import adam_checks, option, refuse_wrong

#: Variables that libraries read when they start, as Megatron-LM's --deterministic-mode wants them.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


#: Megatron's keys for what the trainer does not do.
_INTERLEAVED = "interleaved pipelines are not there yet; leave it out: each rank has one stage"


_EXPERTS = "models with experts are not there yet, so nothing is split over experts; leave it out"


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Megatron's parallel layout. Never part of a fingerprint."""

    NOT_THERE: ClassVar[Mapping[str, str]] = {
        "virtual_pipeline_model_parallel_size": _INTERLEAVED,
        "num_layers_per_virtual_pipeline_stage": _INTERLEAVED,
        "num_virtual_stages_per_pipeline_rank": _INTERLEAVED,
        "expert_model_parallel_size": _EXPERTS,
        "expert_tensor_parallel_size": _EXPERTS,
        "tp_comm_overlap": "overlap inside tensor-parallel layers is not there yet; leave it out",
    }

    tensor_model_parallel_size: int = option(1, "Tensor parallel size.", identity=False)
    pipeline_model_parallel_size: int = option(1, "Pipeline parallel size.", identity=False)
    context_parallel_size: int = option(1, "Context parallel size.", identity=False)
    sequence_parallel: bool = option(False, "Sequence parallelism over the tensor-parallel ranks.", identity=False)
    recompute: Literal["none", "mlp", "full"] = option(
        "none", "What backward computes again: nothing, MLPs, whole layers.", identity=False
    )

    def __post_init__(self) -> None:
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        refuse_wrong(*((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in names))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Next-token training with megatron-core: port `checkpoint` (format megatron). Defaults: PRISM, Table 16."""

    NOT_THERE: ClassVar[Mapping[str, str]] = {**Parallelism.NOT_THERE, "num_experts": _EXPERTS}

    model: ModelConfig = option(..., "The model; default: the recipe's.")
    checkpoint: str | None = option(None, "Weights to start from; None: random initial weights.")
    data: Mapping[str, float] = option(..., "The blend: STAGE/SOURCE to weight; weights are shares of tokens.")
    seq_length: int = option(8192, "Tokens in a sequence.")
    global_batch_size: int = option(128, "Sequences in a step.")
    train_iters: int = option(..., "Steps.")
    lr: float = option(5e-5, "Peak learning rate.")
    min_lr_ratio: float = option(0.1, "Final learning rate over peak.")
    lr_decay_style: Literal["cosine", "linear", "constant", "exponential"] = option("cosine", "Schedule after warm-up.")
    lr_warmup_fraction: float = option(0.01, "Share of the steps that warm up.")
    weight_decay: float = option(0.1, "AdamW weight decay, on matrices only.")
    adam_beta1: float = option(0.9, "AdamW beta 1.")
    adam_beta2: float = option(0.95, "AdamW beta 2.")
    adam_eps: float = option(1e-10, "AdamW epsilon.")
    clip_grad: float = option(1.0, "Largest gradient norm.")
    precision: Literal["bf16", "fp32"] = option("bf16", "Precision of compute.")
    fp8_format: Literal["e4m3", "hybrid"] | None = option(
        None, "FP8 in linear layers by Transformer Engine, on GPUs that have it; hybrid: e5m2 for gradients."
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = option(
        "tensorwise", "How FP8 is scaled, by Transformer Engine's names."
    )
    document_masking: bool = option(False, "Tokens see their own document alone, and its end predicts nothing.")
    packing: Literal["concatenate", "best-fit"] = option(
        "concatenate", "Documents fill sequences end to end; or whole where they fit, with little padding."
    )
    trainable: Literal["all", "attention"] = option(
        "all",
        "Weights that are trained; the others stay as they are. attention: its projections alone, without the norms.",
    )
    deterministic_mode: bool = option(
        False, "Kernels that give the same bits each time, slower on a GPU; a CPU always does.", identity=False
    )
    micro_batch_size: int = option(1, "Sequences a rank takes at once.", identity=False)
    parallelism: Parallelism | Literal["auto"] = option(
        Parallelism(), "The parallel layout; auto: the first that `prism-launch fit` finds.", identity=False
    )
    save_interval: int = option(500, "Steps between checkpoints to resume from.", identity=False)
    keep_last: int = option(2, "Checkpoints to resume from that are kept.", identity=False)
    keep_every: int | None = option(
        None, "Keep those of every so many steps besides, a multiple of save_interval, until the end.", identity=False
    )
    log_interval: int = option(1, "Steps between lines of metrics.", identity=False)
    validation: tuple[str, ...] = option((), "STAGE/SOURCE of held-out text whose losses are measured.")
    eval_interval: int = option(500, "Steps between those measurements; one comes at the end too.", identity=False)
    eval_iters: int = option(8, "Batches of each held-out source.", identity=False)
    loss_spike: float = option(4.0, "A loss this many times the median of 100 steps is divergence.", identity=False)
    entrypoint: str | None = option(
        None, "Megatron-LM's pretrain script, or one like it, to run in place of our loop.", identity=False
    )
    entrypoint_args: tuple[str, ...] = option((), "Words added to the script's arguments.")
    wandb_project: str | None = option(None, "Weights & Biases project; offline without WANDB_API_KEY.", identity=False)

    def __post_init__(self) -> None:
        positive = (
            "seq_length",
            "global_batch_size",
            "train_iters",
            "micro_batch_size",
            "save_interval",
            "keep_last",
            "log_interval",
            "eval_interval",
            "eval_iters",
        )
        refuse_wrong(
            *((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in positive),
            (not self.data, "data", "names no source"),
            *((w <= 0, f"data.{n}", f"weight must be above 0, got {w}") for n, w in self.data.items()),
            *adam_checks(self),
            (self.fp8_format is not None and self.precision != "bf16", "fp8_format", "needs precision bf16"),
            (self.adam_eps <= 0, "adam_eps", f"must be above 0, got {self.adam_eps}"),
            (bool(self.entrypoint_args) and not self.entrypoint, "entrypoint_args", "has no effect without entrypoint"),
            *(
                (bool(self.entrypoint and getattr(self, n)), n, "is for our own loop; leave it out with entrypoint")
                for n in ("validation", "keep_every", "wandb_project", "document_masking")
            ),
            (bool(self.entrypoint) and self.packing == "best-fit", "packing", "best-fit is for our own loop alone"),
            (
                bool(self.entrypoint) and self.trainable != "all",
                "trainable",
                "is for our own loop; leave it out with entrypoint",
            ),
            (self.keep_every is not None and self.keep_every < 1, "keep_every", "must be at least 1"),
            (self.loss_spike <= 1, "loss_spike", f"must be above 1, got {self.loss_spike}"),
            (not 0 <= self.min_lr_ratio <= 1, "min_lr_ratio", f"must be within 0..1, got {self.min_lr_ratio}"),
            (not 0 <= self.lr_warmup_fraction < 1, "lr_warmup_fraction", "must be within 0..1"),
            (
                self.global_batch_size % max(1, self.micro_batch_size) != 0,
                "global_batch_size",
                f"{self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}",
            ),
        )
