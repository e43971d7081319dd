"""One frozen dataclass a stage kind: what a recipe may say under `stages.NAME`, with its default and its meaning.

Standard library only. Training keys are Megatron's, Slurm keys sbatch's long options with underscores. A field marked
`identity=False` does not change what the stage computes, so it stays out of the fingerprint.

A *reference* names what a stage reads: `STAGE`, `STAGE/ITEM` (a source or problem set of a prepare stage), or, where a
checkpoint is read, a path or `hf:ORG/NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from launcher.spec import Family, Format, SpecError, encode

#: Sources and problem sets are files of their names: no separator, no leading dot.
ITEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


def option(default: Any, doc: str, *, identity: bool = True) -> Any:
    """A dataclass field with its documentation; `...` as default means that the field is required."""
    metadata = {"doc": doc, "identity": identity}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def adam_checks(config: Any) -> tuple[tuple[bool, str, str], ...]:
    """Checks of the keys that AdamW has in training and in RL."""
    betas, least = ("adam_beta1", "adam_beta2"), ("weight_decay", "clip_grad")
    values = {name: getattr(config, name) for name in (*betas, *least)}
    return (
        *((not 0 <= values[n] < 1, n, f"must be within 0..1, below 1, got {values[n]}") for n in betas),
        *((values[n] < 0, n, f"must not be negative, got {values[n]}") for n in least),
        (config.lr <= 0, "lr", f"must be above 0, got {config.lr}"),
    )


def refuse_wrong(*checks: tuple[bool, str, str]) -> None:
    """Raise SpecError for every (wrong, field, message) that is wrong."""
    problems = [(name, message) for wrong, name, message in checks if wrong]
    if problems:
        raise SpecError(problems)


@dataclass(frozen=True, kw_only=True)
class Component:
    """What a program beside a stage's main one asks for, such as a reward server. Never part of a fingerprint."""

    nodes: int = option(0, "Nodes of its own; 0: the stage's first node, beside the main program.", identity=False)
    gpus_per_node: int = option(0, "GPUs on each of its nodes.", identity=False)
    ntasks_per_node: int = option(1, "Processes on each node.", identity=False)
    cpus_per_task: int = option(1, "Cores of each process.", identity=False)
    mem: str | None = option(None, "heterogeneous: memory of a node; default: the profile's.", identity=False)
    partition: str | None = option(None, "heterogeneous: partition; default: the profile's.", identity=False)
    image: str | None = option(None, "Container image; default: the stage's.", identity=False)

    def __post_init__(self) -> None:
        counts = ("ntasks_per_node", "cpus_per_task")
        refuse_wrong(
            *((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in counts),
            (self.nodes < 0, "nodes", f"must not be negative, got {self.nodes}"),
            (self.gpus_per_node < 0, "gpus_per_node", f"must not be negative, got {self.gpus_per_node}"),
        )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a stage asks of the cluster. Never part of a fingerprint."""

    nodes: int = option(1, "Nodes of the main program; components with nodes of their own come on top.", identity=False)
    gpus_per_node: int = option(0, "GPUs on each node.", identity=False)
    ntasks_per_node: int = option(1, "Processes on each node; one a GPU where there are GPUs.", identity=False)
    cpus_per_task: int = option(1, "Cores of each process.", identity=False)
    mem: str | None = option(None, "Memory of a node as sbatch takes it, such as 64G.", identity=False)
    time: str | None = option(None, "Time limit as sbatch takes it, such as 4:00:00.", identity=False)
    partition: str | None = option(None, "Partition; default: the profile's.", identity=False)
    account: str | None = option(None, "Account; default: the profile's.", identity=False)
    qos: str | None = option(None, "Quality of service; default: the profile's.", identity=False)
    image: str | None = option(None, "Container image; default: the profile's for this kind of stage.", identity=False)
    components: Mapping[str, Component] = option({}, "Programs beside the main one, by name.", identity=False)
    placement: Literal["shared", "heterogeneous"] = option(
        "shared",
        "shared: components are steps of one allocation; heterogeneous: each is a part of a heterogeneous job.",
        identity=False,
    )

    def __post_init__(self) -> None:
        counts = ("nodes", "ntasks_per_node", "cpus_per_task")
        refuse_wrong(
            *((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in counts),
            (self.gpus_per_node < 0, "gpus_per_node", f"must not be negative, got {self.gpus_per_node}"),
            *(
                (wrong, f"components.{name}.{key}", message)
                for name, component in self.components.items()
                for key, wrong, message in _component_checks(component, self.placement)
            ),
        )


def _component_checks(component: Component, placement: str) -> tuple[tuple[str, bool, str], ...]:
    apart = placement == "heterogeneous"
    beside = "needs placement: heterogeneous; within one allocation every node is of one kind"
    return (
        ("nodes", apart and component.nodes < 1, "a part of a heterogeneous job has at least 1 node of its own"),
        ("partition", not apart and component.partition is not None, beside),
        ("mem", not apart and component.mem is not None, beside),
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model: the family and the `config.json` of its Hugging Face checkpoint. Read from `recipes/models/`."""

    name: str = option(..., "Name of the model.")
    family: Family = option(..., "Family.")
    config: Mapping[str, Any] = option(..., "The model's config.json.")
    source: str | None = option(None, "Where the weights come from: hf:ORG/NAME. None: trained from random weights.")
    init_method_std: float = option(0.02, "Standard deviation of random initial matrices.")

    def __post_init__(self) -> None:
        refuse_wrong((self.init_method_std <= 0, "init_method_std", f"must be above 0, got {self.init_method_std}"))


# ---------------------------------------------------------------------------------------------------------- prepare


_HALF = "holds half a character, which UTF-8 cannot"
#: The padding and end tokens of a trained tokenizer, and the special tokens that text may spell.
PAD, END = "<pad>", "<eos>"
ALLOWED_SPECIAL = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer: one that exists (`path`), or a byte-level BPE trained on the stage's own sources."""

    path: str | None = option(None, "A folder with tokenizer.json, or hf:ORG/NAME. None: train one.")
    vocab_size: int = option(512, "Size of a trained vocabulary.")
    special_tokens: tuple[str, ...] = option(("<think>", "</think>"), "Added to a trained tokenizer.")
    allowed_special: tuple[str, ...] = option(
        ALLOWED_SPECIAL, "Special tokens that become tokens where a text spells them; all others stay text."
    )

    def __post_init__(self) -> None:
        names = ("special_tokens", "allowed_special")
        refuse_wrong(
            *(("" in getattr(self, name), name, "holds an empty token") for name in names),
            *(
                (any("\ud800" <= c <= "\udfff" for token in getattr(self, name) for c in token), name, _HALF)
                for name in names
            ),
        )

    @property
    def too_small(self) -> str | None:
        """What is wrong where a trained vocabulary has no room for all bytes and the special tokens."""
        least = 256 + len({PAD, END, *self.special_tokens})
        if self.path is not None or self.vocab_size >= least:
            return None
        return f"{self.vocab_size} is below the {least} that bytes and specials take"


@dataclass(frozen=True, kw_only=True)
class ProblemSetConfig:
    """What every set of reasoning problems with checked answers says."""

    count: int = option(..., "Problems wanted; fewer are an error.")
    exclude: tuple[str, ...] = option((), "Sets whose problems (by normalised text) are left out of this one.")

    def __post_init__(self) -> None:
        refuse_wrong((self.count < 1, "count", f"must be at least 1, got {self.count}"))


@dataclass(frozen=True, kw_only=True)
class PublishedSet(ProblemSetConfig):
    """Published set: problems as they are published."""

    path: str = option(..., "Its file or folder.")


@dataclass(frozen=True, kw_only=True)
class GeneratedSet(ProblemSetConfig):
    """Generated set: problems by the reasoning-gym library."""

    task: str = option("chain_sum", "Name of the reasoning-gym task.")
    seed_offset: int = option(0, "Added to the stage's seed, so that sets differ.")
    settings: Mapping[str, Any] = option({}, "Arguments of the reasoning-gym task.")
    totals: tuple[int, int] | None = option(None, "chain_sum: keep problems whose running totals stay within.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every source of training text says; it is tokenised into NAME.bin and NAME.idx."""

    kind: str = option(..., "Where the text comes from.")
    share: tuple[float, float] = option((0.0, 1.0), "Part of the documents, shuffled by the seed, from and to.")
    max_bytes: int | None = option(None, "Stop after this much text.")

    def __post_init__(self) -> None:
        low, high = self.share
        refuse_wrong(
            (not 0 <= low < high <= 1, "share", f"must be two rising numbers within 0..1, got [{low}, {high}]"),
            (
                self.max_bytes is not None and self.max_bytes < 1,
                "max_bytes",
                f"must be at least 1, got {self.max_bytes}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class StdlibSource(SourceConfig):
    """The running interpreter's library, as a corpus that every machine has."""

    kind: Literal["python-stdlib"] = option(..., "Where the text comes from.")


@dataclass(frozen=True, kw_only=True)
class FilesSource(SourceConfig):
    """Files of text, or of jsonl with the key `text`."""

    kind: Literal["files"] = option(..., "Where the text comes from.")
    path: str = option(..., "A file or folder, .txt, .py, .md, .jsonl or .json (key `text`), each also as .gz.")


@dataclass(frozen=True, kw_only=True)
class ProblemsSource(SourceConfig):
    """A problem set of this stage, each problem with its trace."""

    kind: Literal["problems"] = option(..., "Where the text comes from.")
    problems: str = option(..., "Name of the problem set.")
    terse_share: float = option(0.0, "Share written with the answer alone in place of a worked trace.")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_wrong((not 0 <= self.terse_share <= 1, "terse_share", f"must be within 0..1, got {self.terse_share}"))


@dataclass(frozen=True, kw_only=True)
class DatasetSource(SourceConfig):
    """A published data set as it is published."""

    kind: Literal["dataset"] = option(..., "Where the text comes from.")
    path: str = option(..., "Its folder.")
    layout: Literal["text", "question-answer", "chat"] = option(
        "text", "What a row holds. Question and answer are joined by one line break; turns name the speaker."
    )


#: A source is told by its `kind`, a published problem set from a generated one by its `path`.
AnySource = StdlibSource | FilesSource | ProblemsSource | DatasetSource
AnyProblemSet = PublishedSet | GeneratedSet


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenizer, token files and problem sets: ports `tokenizer`, `tokens` and `prompts`."""

    folder: str | None = option(
        None, "Folder that paths of sources and problem sets start from; default: the recipe's.", identity=False
    )
    tokenizer: TokenizerConfig = option(TokenizerConfig(), "The tokenizer.")
    sources: Mapping[str, AnySource] = option(..., "Training text by name.")
    problems: Mapping[str, AnyProblemSet] = option({}, "Problem sets by name.")

    def __post_init__(self) -> None:
        known = ", ".join(self.problems) or "none"
        refuse_wrong(
            *(
                (not ITEM_NAME.fullmatch(name), f"{key}.{name}", "a name is letters, digits and . _ -, at most 60")
                for key, named in (("sources", self.sources), ("problems", self.problems))
                for name in named
            ),
            *(
                (True, f"sources.{name}.problems", f"no problem set {s.problems}; there is {known}")
                for name, s in self.sources.items()
                if isinstance(s, ProblemsSource) and s.problems not in self.problems
            ),
            *(
                (True, f"problems.{name}.exclude", f"no problem set {other}; there is {known}")
                for name, p in self.problems.items()
                for other in p.exclude
                if other not in self.problems
            ),
        )


# ------------------------------------------------------------------------------------------------------------ train


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


# ---------------------------------------------------------------------------------------------------------- convert


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A checkpoint in another format: port `checkpoint`. Inserted by the plan; never written in a recipe."""

    checkpoint: str = option(..., "The checkpoint to convert.")
    source: Format = option(..., "Its format.")
    target: Format = option(..., "The format wanted.")
    verify: bool = option(True, "Round trip, bit by bit.", identity=False)


# ------------------------------------------------------------------------------------------------------------ merge


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """A linear combination of checkpoints of one model: port `checkpoint`. Config, tokenizer and types are the first's.

    PRISM, section 8.1: 0.15 of the base and 0.85 of the mid-trained model, before the context is made long again.
    """

    checkpoints: tuple[str, ...] = option(..., "Checkpoints to add up, two or more.")
    weights: tuple[float, ...] = option(..., "Their weights, in the same order; they should add up to 1.")
    format: Literal["megatron", "hf"] = option(
        "megatron", "Format to read and write; megatron where training follows, hf where RL by trl or evaluation does."
    )
    verify: bool = option(True, "Read back what was written and compare.", identity=False)

    def __post_init__(self) -> None:
        named, weights = self.checkpoints, self.weights
        counts = f"{len(weights)} for {len(named)} checkpoints; one for each"
        refuse_wrong(
            (len(named) < 2, "checkpoints", f"names {len(named)}; two or more are added up"),
            (len(set(named)) < len(named), "checkpoints", "names one twice"),
            (len(weights) != len(named), "weights", counts),
            (not any(weights), "weights", "are all 0"),
        )


# --------------------------------------------------------------------------------------------------------------- rl


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning with verifiable rewards, what every backend knows: port `checkpoint`, in its format."""

    backend: str = option(..., "The library that trains.")
    algorithm: Literal["grpo", "reinforce", "ppo"] = option("grpo", "The algorithm.")
    checkpoint: str = option(..., "The policy to start from.")
    prompts: str = option(..., "STAGE/SET of problems.")
    reward: Literal["answer-and-format"] = option(
        "answer-and-format", "1 for one non-empty <think> block, then the right answer, then the end token; else 0."
    )
    max_steps: int = option(..., "Optimizer steps.")
    prompts_per_step: int = option(16, "Prompts in a step.")
    num_generations: int = option(8, "Completions sampled for each prompt.")
    max_completion_length: int = option(32, "Longest completion in tokens.")
    temperature: float = option(1.0, "Sampling temperature.")
    lr: float = option(1e-6, "Learning rate after warm-up.")
    warmup_steps: int = option(5, "Warm-up steps.")
    beta: float = option(0.0, "Weight of the KL term.")
    adam_beta1: float = option(0.9, "AdamW beta 1.")
    adam_beta2: float = option(0.95, "AdamW beta 2.")
    weight_decay: float = option(0.0, "AdamW weight decay.")
    clip_grad: float = option(1.0, "Largest gradient norm.")
    save_interval: int = option(25, "Steps between checkpoints to resume from.", identity=False)

    def __post_init__(self) -> None:
        positive = ("max_steps", "prompts_per_step", "max_completion_length", "save_interval")
        refuse_wrong(
            *((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in positive),
            (self.num_generations < 2, "num_generations", "GRPO compares completions: at least 2"),
            (self.temperature <= 0, "temperature", f"must be above 0, got {self.temperature}"),
            (self.warmup_steps < 0, "warmup_steps", f"must not be negative, got {self.warmup_steps}"),
            (self.beta < 0, "beta", f"must not be negative, got {self.beta}"),
            *adam_checks(self),
        )


@dataclass(frozen=True, kw_only=True)
class TrlRL(RLConfig):
    """Backend trl: TRL's GRPOTrainer in one process."""

    backend: Literal["trl"] = option(..., "The library that trains.")
    num_iterations: int = option(1, "Optimizer passes over a batch of samples.")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_wrong((self.num_iterations < 1, "num_iterations", f"must be at least 1, got {self.num_iterations}"))


@dataclass(frozen=True, kw_only=True)
class MegatronRL(RLConfig):
    """What the backends whose policy is Megatron's know besides."""

    max_prompt_length: int = option(..., "Longest prompt in tokens: memory is laid out for prompt and completion.")
    end_strings: tuple[str, ...] = option((), "What ends a completion.")
    lr_decay_style: Literal["constant", "linear"] = option("constant", "Schedule after warm-up; linear ends at 0.")
    micro_batch_size: int = option(1, "Sequences that a rank trains on at once.", identity=False)
    parallelism: Parallelism = option(Parallelism(), "The policy's parallel layout.", identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("max_prompt_length", "micro_batch_size")
        refuse_wrong(*((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in positive))


@dataclass(frozen=True, kw_only=True)
class AlignerRL(MegatronRL):
    """Backend nemo-aligner: NeMo-Aligner's REINFORCE, one optimizer step from each batch of samples."""

    backend: Literal["nemo-aligner"] = option(..., "The library that trains.")


@dataclass(frozen=True, kw_only=True)
class NemoRL(MegatronRL):
    """Backend nemo-rl: NeMo-RL's GRPO, on-policy, one optimizer step from each batch of samples."""

    backend: Literal["nemo-rl"] = option(..., "The library that trains.")
    importance_cap: float | None = option(
        None, "Largest ratio of training to sampling probability (truncated). None: off."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        cap = self.importance_cap
        refuse_wrong((cap is not None and cap < 1, "importance_cap", f"must be at least 1, got {cap}"))


@dataclass(frozen=True, kw_only=True)
class OpenInstructRL(RLConfig):
    """Backend open-instruct: not built yet."""

    backend: Literal["open-instruct"] = option(..., "The library that trains.")


#: An RL stage is told by its `backend`.
AnyRL = TrlRL | AlignerRL | NemoRL | OpenInstructRL


# --------------------------------------------------------------------------------------------------------- evaluate


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy of checkpoints on problem sets: port `scores`."""

    checkpoints: tuple[str, ...] = option(..., "Checkpoints to compare.")
    benchmarks: tuple[str, ...] = option(..., "STAGE/SET of held-out problems.")
    temperatures: tuple[float, ...] = option((0.0, 0.6, 1.0), "Sampling temperatures; 0 is greedy.")
    samples: int = option(1, "Answers sampled for each problem.")
    top_p: float = option(1.0, "Sample from the likeliest words that together have this probability.")
    max_new_tokens: int = option(32, "Longest completion in tokens.")
    batch_size: int = option(128, "Prompts generated together; decides which random numbers each one gets.")
    seeds: tuple[int, ...] = option((), "Sampling seeds, one evaluation each; empty: the stage's seed alone.")
    fan_out: bool = option(
        False,
        "A stage for each benchmark and seed, on Slurm one job array: what fails is redone alone.",
        identity=False,
    )

    def __post_init__(self) -> None:
        refuse_wrong(
            (not self.checkpoints, "checkpoints", "names no checkpoint"),
            (not self.benchmarks, "benchmarks", "names no problem set"),
            (not self.temperatures, "temperatures", "names no temperature"),
            (any(t < 0 for t in self.temperatures), "temperatures", "must not be negative"),
            (self.samples < 1, "samples", f"must be at least 1, got {self.samples}"),
            (not 0 < self.top_p <= 1, "top_p", f"must be above 0 and at most 1, got {self.top_p}"),
            (self.max_new_tokens < 1, "max_new_tokens", f"must be at least 1, got {self.max_new_tokens}"),
            (self.batch_size < 1, "batch_size", f"must be at least 1, got {self.batch_size}"),
            (any(s < 0 for s in self.seeds), "seeds", "must not be negative"),
            *(
                (len(set(values)) < len(values), name, "names one twice")
                for name, values in (("benchmarks", self.benchmarks), ("seeds", self.seeds))
            ),
        )


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


CONFIGS: dict[str, Any] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "convert": ConvertConfig,
    "merge": MergeConfig,
    "rl": AnyRL,
    "evaluate": EvaluateConfig,
    "analyze": AnalyzeConfig,
}


def identity(value: Any) -> Any:
    """The plain-JSON part of a config that decides what a stage computes.

    Left out are fields marked identity=False and values equal to their default, so that a key that is added later moves
    no fingerprint. A default that changes, or its meaning, raises the kind's VERSION.
    """
    if hasattr(value, "__dataclass_fields__"):
        kept: list[Any] = [f for f in fields(value) if f.metadata.get("identity", True)]
        return {f.name: identity(v) for f in kept if (v := getattr(value, f.name)) != default_of(f)}
    if isinstance(value, Mapping):
        return {str(k): identity(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(v) for v in value]
    return encode(value)


def default_of(f: Any) -> Any:
    """A field's default, or MISSING where it is required."""
    if f.default is not MISSING:
        return f.default
    factory: Callable[[], Any] = f.default_factory
    return MISSING if f.default_factory is MISSING else factory()


def with_value(config: Any, key: tuple[str, ...], value: Any) -> Any:
    """A config with another value at a path of field and mapping names."""
    head, *rest = key
    if isinstance(config, Mapping):
        return {**config, head: with_value(config[head], tuple(rest), value) if rest else value}
    return replace(config, **{head: with_value(getattr(config, head), tuple(rest), value) if rest else value})
