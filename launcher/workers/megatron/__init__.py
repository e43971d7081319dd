"""Training with megatron-core: one loop for GPU nodes and for a CPU.

Importing this package readies megatron-core for a machine without CUDA (`cpu_mode`), so that no module of it can be
imported too early. On a GPU it sets what must be set before CUDA starts, where the cluster's profile does not.
"""

import os

from launcher.workers.megatron import cpu_mode, mamba_triton

if "PYTORCH_ALLOC_CONF" not in os.environ:  # the older name, which every version of torch reads
    # Without it layers of many sizes leave gaps; `launcher.fit.memory` counts on it.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Tensor parallelism's overlap relies on communication being queued first: megatron.core.tensor_parallel.layers.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

if not cpu_mode.install():
    mamba_triton.install()
