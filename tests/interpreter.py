"""Triton's interpreter, without what takes most of its time; it computes and checks the same."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from triton.runtime import interpreter

_patched: set[Any] = set()
_POINTER = np.dtype(np.uint64)
_scalar_type = functools.cache(interpreter._get_np_dtype)


def make_faster() -> None:
    """Replace the interpreter's functions by those of this module."""
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter._get_np_dtype = _numpy_type
    # Each sum and product of integers is made again in 64 bits, and compared with the bounds; what
    # is found is reported in debug mode alone, which no test turns on.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As Triton's interpreter does, but for replacing the functions of `triton.language`.

    It does so at a kernel's start, and again at every call of a device function, never undoing
    that; the first time is needed for the language that Triton's own library sees.
    """
    if self.fn not in _patched:
        _patched.add(self.fn)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _numpy_type(kind: Any) -> np.dtype:
    """The original makes a table of all types at every call."""
    scalar = kind.scalar
    return _POINTER if scalar.is_ptr() else _scalar_type(scalar)
