"""Training with megatron-core: one loop for GPU nodes and for a CPU.

Importing this package readies megatron-core for a machine without CUDA (`cpu_mode`), so that no module of it can be
imported too early.
"""

from launcher.workers.megatron import cpu_mode

cpu_mode.install()
