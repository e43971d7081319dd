"""Unpickling what others wrote: nothing but admitted names, and no more memory or depth than the bytes can mean.

The C unpickler believes every number in a pickle: a memo index of a few bytes makes it take gigabytes, a tuple nested
deep enough ends the process. So its operations are looked at first. Standard library only.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

#: Larger than any `.metadata` of weights; one takes about as much again for every operation in it.
MOST_BYTES = 1 << 30
#: Sizes and places in files have 64 bits.
_MOST_BITS = 128
_MOST_DEPTH = 200
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_FILL = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_NONE = {"PROTO", "FRAME", "STOP"}
_NUMBERS = {"LONG1", "LONG4", "INT", "LONG", "BININT", "BININT1", "BININT2"}
_MARK = object()


class Refusing(pickle.Unpickler):
    """Loads a pickle that names nothing but what is in `admitted`, by module and name."""

    def __init__(self, content: bytes, admitted: Mapping[tuple[str, str], Any]):
        super().__init__(io.BytesIO(content))
        self._admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for. Raises UnpicklingError for all others."""
        try:
            return self._admitted[module, name]
        except KeyError:
            raise UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuses."""
        raise UnpicklingError("it refers to objects outside itself")


def load(content: bytes, admitted: Mapping[tuple[str, str], Any]) -> Any:
    """What a pickle holds. Raises UnpicklingError, or whatever broken bytes lead an unpickler to."""
    check(content)
    return Refusing(content, admitted).load()


def check(content: bytes) -> None:
    """Raise UnpicklingError where a pickle's numbers or its depth are such as no checkpoint has."""
    if len(content) > MOST_BYTES:
        raise UnpicklingError(f"it has {len(content)} bytes")
    stack: list[Any] = []
    memo: dict[Any, int] = {}
    for count, (operation, value, _) in enumerate(pickletools.genops(content)):
        name = operation.name
        if name in _NUMBERS and isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise UnpicklingError("it holds a number that is larger than any size")
        if name in _PUT:
            index = len(memo) if value is None else value
            if index > count:
                raise UnpicklingError("it numbers more objects than there are in it")
            memo[index] = stack[-1] if stack and stack[-1] is not _MARK else 0
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _GET:
            stack.append(memo.get(value, 0))
        elif name == "DUP":
            stack.append(stack[-1] if stack else 0)
        elif name not in _NONE:
            _step(operation, stack)


def _step(operation: Any, stack: list[Any]) -> None:
    """Carry an operation out on the depths of what is on the stack."""
    before, inside = operation.stack_before, 0
    if pickletools.markobject in before:
        while stack and (top := stack.pop()) is not _MARK:
            inside = max(inside, top)
        before = before[: before.index(pickletools.markobject)]
    depths = [0 if top is _MARK else top for top in (stack.pop() if stack else 0 for _ in before)]
    if operation.name in _FILL:  # the container stays as deep as it is, unless what comes into it is deeper
        depth = max(depths[-1], max([inside, *depths[:-1]]) + 1)
    else:
        depth = max([inside, *depths]) + 1 if operation.stack_before else 0
    if depth > _MOST_DEPTH:
        raise UnpicklingError("it is nested deeper than any checkpoint")
    stack.extend([depth] * len(operation.stack_after))
