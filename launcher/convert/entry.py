"""What a tensor in a file is: its shape and type."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor's shape and type, known before its bytes are read."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in memory order, as files store them; a copy only where it is not contiguous."""
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
