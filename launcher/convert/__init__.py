"""Checkpoints from one format to another, tensor by tensor: no model is built, memory stays near the largest tensor.

    hf          hf.HfReader, hf.HfWriter                     safetensors
    megatron    torch_dist.TorchDistReader, TorchDistWriter  megatron-core's torch_dist
    nemo        the same with another prefix, and nemo       NeMo 1's, a folder or an archive (files)

`folders.open_checkpoint` finds out what a checkpoint is. Each reader gives named tensors and what they are
(`entry.Entry`); `links` pairs the names of two formats through the family's table in `launcher.models`; `moving` moves
the tensors in `lanes` and compares what was written; `conversion` is the whole of it, `merge` the sum of checkpoints,
`parity` the comparison of logits. `target` is where by hand a checkpoint is written: whole, or not at all.
"""
