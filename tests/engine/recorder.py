"""A stand-in for the `transformer_engine` package, for megatron-core's own wrappers to be built upon. Not a test.

Its modules have the arguments of Transformer Engine 2.12's, and no others; they refuse what the real ones assert, keep
every keyword that they are built and called with in `RECORDS`, and compute in plain torch on the CPU what the real ones
compute in kernels.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Name of the module, whether it was built or called, and the keywords that were not their defaults.
RECORDS: list[tuple[str, str, dict[str, Any]]] = []
#: Modules of megatron-core that import triton, for what nothing here turns on.
_TRITON = (
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",
    "megatron.core.transformer.moe.ops.paged_stash",
)


def record(name: str, how: str, **keywords: Any) -> None:
    """Keep what tells: numbers, words, shapes of tensors."""
    kept = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in keywords.items() if v is not None}
    RECORDS.append((name, how, kept))


# ------------------------------------------------------------------------------------------------- linear and norms


class _Multiply(torch.autograd.Function):
    """A linear layer whose weight's gradient goes into `main_grad`, as Transformer Engine's do when fused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fused = fused
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        made = None
        if ctx.needs_input_grad[1]:
            made = torch.einsum("...o,...i->oi", grad, x)
            if ctx.fused:
                assert hasattr(weight, "main_grad"), "fuse_wgrad_accumulation without DDP's main_grad"
                weight.main_grad.add_(made)
                weight.grad_added_to_main_grad = True
                made = torch.zeros_like(weight)
        return grad @ weight, made, None


class Linear(nn.Module):
    """`transformer_engine.pytorch.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: Any = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        self._keep(in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size)
        assert not bias, "none of these models has biases"
        split = {"column": (out_features // tp_size, in_features), "row": (out_features, in_features // tp_size)}
        shape = split.get(parallel_mode or "", (out_features, in_features))
        self.parallel_mode = parallel_mode
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype))
        _mark(self.weight, parallel_mode)
        record(
            type(self).__name__, "built", parallel_mode=parallel_mode, tp_size=tp_size, device=str(device),
            sequence_parallel=sequence_parallel, fuse_wgrad_accumulation=fuse_wgrad_accumulation,
        )  # fmt: skip

    def _keep(self, inputs: int, outputs: int, sequence: bool, fused: bool, group: Any, size: int) -> None:
        assert inputs % size == 0 and outputs % size == 0, "Transformer Engine divides without rest"
        self.sequence_parallel, self.fused, self.tp_group, self.tp_size = sequence and size > 1, fused, group, size

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        record(type(self).__name__, "called", is_first_microbatch=is_first_microbatch)
        return self._multiply(inp)

    def _multiply(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        group = self.tp_group
        if self.tp_size > 1 and self.parallel_mode == "column":
            x = (
                mappings.gather_from_sequence_parallel_region(x, group=group)
                if self.sequence_parallel
                else mappings.copy_to_tensor_model_parallel_region(x, group=group)
            )
        out = _Multiply.apply(x, self.weight, self.fused)
        if self.tp_size > 1 and self.parallel_mode == "row":
            out = (
                mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
                if self.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region(out, group=group)
            )
        return out

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group = group

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


def _mark(weight: nn.Parameter, mode: str | None) -> None:
    """Transformer Engine names the dimension that is split; the norm of the gradient goes by it."""
    weight.tensor_model_parallel = mode is not None
    weight.partition_dim = 1 if mode == "row" else 0
    weight.partition_stride = 1


class LayerNormLinear(Linear):
    """`transformer_engine.pytorch.LayerNormLinear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: Any = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size,
            bias=bias, params_dtype=params_dtype, parallel_mode=parallel_mode, device=device,
        )  # fmt: skip
        assert normalization == "RMSNorm" and parallel_mode == "column" and not return_layernorm_output
        assert not zero_centered_gamma
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        record(type(self).__name__, "called", is_first_microbatch=is_first_microbatch)
        return self._multiply(F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps))


class RMSNorm(nn.RMSNorm):
    """`transformer_engine.pytorch.RMSNorm`."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: Any = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",
    ) -> None:
        assert (normalized_shape is None) != (hidden_size is None) and not zero_centered_gamma
        super().__init__(normalized_shape or hidden_size, eps, dtype=params_dtype)
        self.weight.sequence_parallel = bool(sequence_parallel)
        record("RMSNorm", "built", eps=eps, sequence_parallel=sequence_parallel, device=str(device))

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


# --------------------------------------------------------------------------------------------------------- attention


class DotProductAttention(nn.Module):
    """`transformer_engine.pytorch.DotProductAttention`."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and softmax_type == "vanilla" and not return_max_logit
        groups = num_gqa_groups or num_attention_heads
        assert num_attention_heads % tp_size == 0 and groups % tp_size == 0 and num_attention_heads % groups == 0
        self.groups, self.kv_channels = groups // tp_size, kv_channels
        self.window, self.scale = window_size, softmax_scale or kv_channels**-0.5
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        self.cp_size = cp_group.size() if cp_group is not None else 1
        record(
            "DotProductAttention", "built", window_size=window_size, tp_size=tp_size, attn_mask_type=attn_mask_type,
            softmax_scale=softmax_scale, layer_number=layer_number, num_gqa_groups=num_gqa_groups,
            cp_size=self.cp_size, cp_comm_type=cp_comm_type if self.cp_size > 1 else None,
        )  # fmt: skip

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        num_splits: int | None = 1,
    ) -> Tensor:
        form = qkv_format or "sbhd"
        record(
            "DotProductAttention", "called", qkv_format=form, attn_mask_type=attn_mask_type, query=query_layer,
            max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_kv, cu_seqlens_q=cu_seqlens_q,
        )  # fmt: skip
        assert attention_mask is None or "padding" in str(attn_mask_type) or attn_mask_type == "arbitrary"
        assert key_layer.shape[-2] == self.groups and key_layer.shape[-1] == self.kv_channels
        if self.cp_size > 1:
            self._refuse_in_context_parallel(form, query_layer, key_layer, attn_mask_type, cu_seqlens_q_padded)
        q, k, v = query_layer, key_layer, value_layer
        if form == "thd":
            assert q.dim() == 3 and "padding" in str(attn_mask_type), "thd format needs a padding mask"
            assert cu_seqlens_q is not None and cu_seqlens_kv is not None
            assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
            assert int(cu_seqlens_q[-1]) == len(q) and int(cu_seqlens_q.diff().max()) <= (max_seqlen_q or 0)
            lengths = cu_seqlens_q.diff().tolist()
            parts = zip(*(x.unsqueeze(1).split(lengths) for x in (q, k, v)), strict=True)
            return torch.cat([self._attend(*part, torch.arange(len(part[0]))) for part in parts]).flatten(1)
        assert attn_mask_type == "causal" and q.dim() == 4
        mine = torch.arange(len(q))
        if self.cp_size > 1:
            from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region as gather

            from launcher.workers.megatron.attention import context_order, context_positions

            k, v = (gather(x, group=self.cp_group) for x in (k, v))
            natural = context_order(len(k), self.cp_size).argsort()
            k, v, mine = k[natural], v[natural], context_positions(len(k), self.cp_size, self.cp_group.rank())
        return self._attend(q, k, v, mine)

    def _refuse_in_context_parallel(self, form: str, q: Tensor, k: Tensor, mask: str | None, padded: Any) -> None:
        """What `attn_forward_func_with_cp` and the class of each way to communicate assert."""
        how, ways = self.cp_comm_type, ("p2p", "all_gather", "a2a", "a2a+p2p")
        assert how in ways, f"cp_comm_type {how}"
        assert form != "thd" or padded is not None, "cu_seqlens_padded can not be None with thd"
        windowed = self.window is not None and tuple(self.window) not in ((-1, 0), (-1, -1))
        assert not windowed or how in ("a2a", "all_gather"), f"no sliding window with {how}"
        if how == "all_gather":
            assert "padding" not in str(mask) and form != "thd" and q.shape[-1] % 8 == 0
        if how == "a2a":
            assert q.shape[-2] % self.cp_size == 0 and k.shape[-2] % self.cp_size == 0
        assert q.shape[0] % 2 == 0, "a rank holds a chunk from either end"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mine: Tensor) -> Tensor:
        distance = mine[:, None] - torch.arange(len(k))[None, :]
        seen = distance >= 0
        if self.window is not None and self.window[0] >= 0:
            seen &= distance <= self.window[0]
        a, b, c = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(a, b, c, attn_mask=seen, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """`transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb`."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    record("rope", "called", tensor_format=tensor_format, fused=fused, cp_size=cp_size)
    assert fused and not interleaved and freqs.dtype == torch.float32
    if tensor_format == "sbhd":
        assert t.dim() == 4 and cu_seqlens is None
        return _apply_rotary_pos_emb_bshd(t, freqs)
    assert tensor_format == "thd" and t.dim() == 3 and cu_seqlens is not None and cp_size == 1
    parts = t.unsqueeze(1).split(cu_seqlens.diff().tolist())
    return torch.cat([_apply_rotary_pos_emb_bshd(part, freqs[: len(part)]) for part in parts]).squeeze(1)


class SplitAlongDim:
    """`transformer_engine.pytorch.attention._SplitAlongDim`."""

    @staticmethod
    def apply(mixed: Tensor, dim: int, sizes: Any) -> tuple[Tensor, ...]:
        return mixed.split(sizes, dim)


def get_cpu_offload_context(
    enabled: bool = False,
    num_layers: int | None = 1,
    model_layers: int = 1,
    offload_activations: bool = True,
    offload_weights: bool = False,
    double_buffering: bool = False,
) -> Any:
    """`transformer_engine.pytorch.cpu_offload.get_cpu_offload_context`, as it is when not enabled."""
    assert not enabled
    return contextlib.nullcontext(), lambda tensor: tensor


# --------------------------------------------------------------------------------------------------------- optimizer


class FusedAdam(torch.optim.AdamW):
    """`transformer_engine.pytorch.optimizers.FusedAdam`, with states and masters in fp32."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        assert adam_w_mode and bias_correction
        super().__init__(params, lr, betas, eps, weight_decay)
        record("FusedAdam", "built", lr=lr, betas=betas, eps=eps, adam_w_mode=adam_w_mode, weight_decay=weight_decay)


def _local(name: str) -> Any:
    """The functions over many tensors at once: megatron-core's own for where neither engine nor Apex is."""

    def call(*args: Any, **kwargs: Any) -> Any:
        from megatron.core import utils

        return getattr(utils, f"local_{name}")(*args, **kwargs)

    return call


# ----------------------------------------------------------------------------------------------------------- package


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of the package; any other class in it is there by name, and cannot be made."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        wanted = f"{name}.".startswith("transformer_engine.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__.update(_CONTENTS.get(module.__name__, {}))


class _Module(types.ModuleType):
    __version__ = "2.12.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{self.__name__}.{name}")


class _Named(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{cls.__module__}.{cls.__name__}.{name}")


def _named(name: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name}: a stand-in, of which only the name is there")

    module, _, own = name.rpartition(".")
    return _Named(own, (torch.nn.Module,), {"__init__": refuse, "__module__": module})


_CONTENTS: dict[str, dict[str, Any]] = {
    "transformer_engine.pytorch": {
        "Linear": Linear,
        "LayerNormLinear": LayerNormLinear,
        "RMSNorm": RMSNorm,
        "DotProductAttention": DotProductAttention,
    },
    "transformer_engine.pytorch.attention": {"_SplitAlongDim": SplitAlongDim},
    "transformer_engine.pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
    **{
        f"transformer_engine.pytorch.{name}": {"get_cpu_offload_context": get_cpu_offload_context}
        for name in ("cpu_offload", "cpu_offload_v1")
    },
    "transformer_engine.pytorch.optimizers": {
        "FusedAdam": FusedAdam,
        **{n: _local(n) for n in ("multi_tensor_applier", "multi_tensor_l2_norm", "multi_tensor_scale")},
        "multi_tensor_l2norm": _local("multi_tensor_l2_norm"),
    },
}


def install() -> None:
    """Ready this process: the package, then CPU mode, then layers that believe in a GPU with Transformer Engine."""
    for name in _TRITON:
        sys.modules[name] = _Module(name)
    sys.meta_path.insert(0, _Finder())
    import launcher.workers.megatron  # noqa: F401  must come before megatron.core

    # isort: split
    from launcher.workers.megatron import layers, mamba_triton

    layers.cpu_mode = types.SimpleNamespace(active=lambda: False)  # type: ignore[assignment]
    mamba_triton.has_scan = mamba_triton.has_fused_kernel = lambda: True
