"""A script of the shape of Megatron-LM's pretrain_gpt.py, small: its arguments, log lines, checkpoints and signal.

It builds megatron-core's GPTModel from the arguments, takes a few steps of SGD on the data it is given, and saves by
megatron-core's dist_checkpointing. FAULT=exit|kill|early in the environment makes it fail.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

import launcher.workers.megatron  # noqa: F401  megatron-core on a CPU

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

NUMBERS = (
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels",
    "vocab-size", "max-position-embeddings", "make-vocab-size-divisible-by", "seq-length", "micro-batch-size",
    "global-batch-size",
    "train-iters", "save-interval", "seed", "rotary-base",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("norm-epsilon", "lr"):
        parser.add_argument(f"--{name}", type=float, required=True)
    for name in ("data-path", "spec"):
        parser.add_argument(f"--{name}", nargs="*")
    for name in ("save", "load", "tokenizer-model", "ckpt-format"):
        parser.add_argument(f"--{name}")
    for name in ("swiglu", "finetune", "untie-embeddings-and-output-weights", "exit-signal-handler", "my-own-flag"):
        parser.add_argument(f"--{name}", action="store_true")
    args, others = parser.parse_known_args()

    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(args.seed)
    torch.manual_seed(args.seed)

    unit = args.make_vocab_size_divisible_by
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        gated_linear_unit=args.swiglu, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
        layernorm_epsilon=args.norm_epsilon, add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, bias_activation_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=-(-args.vocab_size // unit) * unit,
        max_sequence_length=args.max_position_embeddings, position_embedding_type="rope", rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    def sharded() -> dict:
        return model.sharded_state_dict(metadata={"singleton_local_shards": False})

    first, tracker = 0, "latest_checkpointed_iteration.txt"
    if args.load:
        first = int((Path(args.load) / tracker).read_text())
        state = sharded()
        names = {name for name in state if "_extra_state" not in name}
        loaded = dist_checkpointing.load({n: state[n] for n in names}, f"{args.load}/iter_{first:07d}")
        model.load_state_dict(loaded, strict=False)
        first = 0 if args.finetune else first

    def save(iteration: int) -> None:
        folder = Path(args.save) / f"iter_{iteration:07d}"
        folder.mkdir(exist_ok=True)
        dist_checkpointing.save(sharded(), str(folder))
        (Path(args.save) / tracker).write_text(str(iteration))

    tokens = IndexedDataset(args.data_path[1])
    print(f"connections: {os.environ['CUDA_DEVICE_MAX_CONNECTIONS']}")
    print(f"others: {' '.join(others)} mine: {args.my_own_flag} tokenizer: {Path(args.tokenizer_model).is_dir()}")
    for iteration in range(first + 1, args.train_iters + 1):
        if os.environ.get("FAULT") == "exit" and iteration == 2:
            sys.exit("the script's own fault")
        if os.environ.get("FAULT") == "kill" and iteration == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        text = torch.cat([torch.from_numpy(tokens[iteration + i].astype("int64")) for i in range(8)])[
            : args.seq_length + 1
        ]
        ids, labels = text[None, :-1], text[None, 1:]
        loss = model(ids, torch.arange(ids.shape[1])[None], None, labels=labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(
            f" [2026-01-01] iteration {iteration:8d}/{args.train_iters:8d} | consumed samples: {iteration} | "
            f"learning rate: {args.lr:.6E} | lm loss: {loss.item():.6E} | grad norm: 1.000 |"
        )
        time.sleep(float(os.environ.get("SLEEP", "0")))
        due = iteration == args.train_iters or iteration % args.save_interval == 0 or stop
        if due and not (os.environ.get("FAULT") == "early" and iteration == args.train_iters):
            save(iteration)
        if stop:
            print("exiting program after receiving SIGTERM.")
            break


if __name__ == "__main__":
    main()
