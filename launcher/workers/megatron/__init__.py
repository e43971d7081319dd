"""Training with megatron-core: one loop for GPU nodes and for a CPU."""
