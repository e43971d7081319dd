"""What stands around a model in training: data parallelism, the optimizer, the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.ssm.mamba_mixer import MambaMixer

from launcher.configs import TrainConfig


def wrap(module: torch.nn.Module) -> DistributedDataParallel:
    """The model with its gradients and weights in buckets, whose exchange runs beside the computation.

    A bucket of gradients is reduced while backward goes on with the layers before it; a bucket of weights, of which
    the step made each replica's share, is gathered while forward goes on up to the layer that wants it. So between a
    step and the next forward pass a rank's weights are old but for its own share: `gather_weights`.
    """
    overlap = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    # align_param_gather and param_sync_func, which training.py sets with it, are the interleaved schedule's alone.
    distributed = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    model = DistributedDataParallel(module.config, distributed, module)
    if distributed.overlap_grad_reduce:
        module.config.no_sync_func = model.no_sync
        # Pipeline stages after the first reduce all at once when their last backward is done, in the bubble.
        module.config.grad_sync_func = model.start_grad_sync
    if distributed.overlap_param_gather:
        _gather_convolutions(model)
    return model


def _gather_convolutions(model: DistributedDataParallel) -> None:
    """Wait for a mixer's convolution too before the mixer runs: it takes its weights without calling it."""
    gather = model._make_forward_pre_hook()
    for module in model.modules():
        if isinstance(module, MambaMixer) and isinstance(getattr(module, "conv1d", None), torch.nn.Module):
            module.register_forward_pre_hook(partial(_before, gather, module.conv1d))


def _before(gather: Callable[[torch.nn.Module], None], part: torch.nn.Module, *_: object) -> None:
    gather(part)


def gather_weights(model: DistributedDataParallel) -> None:
    """Let every rank hold the weights that the last step made; all ranks call it before they read them.

    Progress needs none of it: of what is trained it holds each rank's own share.
    """
    if model.ddp_config.overlap_param_gather:
        model.start_param_sync(force_sync=True)


def build_optimizer(config: TrainConfig, model: DistributedDataParallel) -> ChainedOptimizer:
    """megatron-core's distributed AdamW, with fp32 master weights where the model is in bf16."""
    bf16 = config.precision == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.lr * config.min_lr_ratio,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad or math.inf,  # megatron-core skips the norm at 0, and the metrics want it
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=model.ddp_config.overlap_param_gather,
        ),
        [model],
    )
    _mend_order(optimizer)
    return optimizer


def _mend_order(optimizer: ChainedOptimizer) -> None:
    """Say where in its group each parameter is: fp32 ones first.

    megatron-core 0.16.1 puts them first, but notes them in the order of its buffers, and so would save the state of
    one parameter as another's in a bf16 model that has some in fp32.
    """
    for part in optimizer.chained_optimizers:
        groups = zip(part.model_fp32_groups, part.model_float16_groups, strict=True)
        for index, (fp32, float16) in enumerate(groups):
            places = {parameter: (index, place) for place, parameter in enumerate([*fp32, *float16])}
            part.model_param_group_index_map.update(places)


def build_scheduler(config: TrainConfig, optimizer: ChainedOptimizer) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in samples: linear warm-up from 0, then decay. The first step has a rate of 0."""
    samples = config.train_iters * config.global_batch_size
    warmup = config.lr_warmup_fraction * samples
    # Megatron has exponential decay as the last phase of warm-up, stable, decay: here all of what follows warm-up.
    exponential = config.lr_decay_style == "exponential"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=samples,
        lr_decay_style="WSD" if exponential else config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=samples,
        wd_incr_style="constant",
        wsd_decay_steps=samples - warmup if exponential else None,
        lr_wsd_decay_style="exponential" if exponential else None,
    )
