"""Checkpoints from one format to another, tensor by tensor: no model is built, memory stays near the largest tensor.

    hf          hf.HfReader, hf.HfWriter                    safetensors
    megatron    torch_dist.TorchDistReader, TorchDistWriter  megatron-core's torch_dist

Each reader gives named tensors and what they are (`entry.Entry`); `links` pairs the names of the two formats through
the family's table in `launcher.models`; `conversion` moves the tensors and verifies what was written.
"""
