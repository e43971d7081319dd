"""Checkpoint conversion: readers and writers of named tensors, streaming."""
