"""Processes that start in a fraction of a second: forked from one that has imported everything.

A rank of a test needs torch, DeepSpeed and megatron-core, whose imports take seconds. The server
imports them once; every rank is a fork of it and starts with nothing of the tests before it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context

_context = multiprocessing.get_context("forkserver")
# The first makes sure that the others find no GPU: a fork could not use what they opened.
_PRELOADED = ["tests.cpu_only", "pytest", "megasparse.train.main", "tests.dist", "tests.frozen"]
_context.set_forkserver_preload(_PRELOADED)


def context() -> multiprocessing.context.ForkServerContext:
    """Where ranks are forked from."""
    return _context
