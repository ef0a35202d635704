"""Functions of tensors as graphs that run without the interpreter lock, one call each.

An operation called from Python gives the interpreter lock up and takes it back, and waits for it each time that another
thread is busy. A graph does so once. It runs as it is written, never as torch's optimiser of graphs would have it: that
one rewrites a graph in its second run, and a restart must compute what the run before it did.

TorchScript is deprecated, but nothing else in torch runs a graph without Python and without a compiler. Where it is
gone the same functions run operation by operation.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Graph = Callable[..., Any]


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Graphs run unchanged, and nothing is recorded for autograd."""
    with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        yield


@cache
def scripted(function: Graph) -> Graph:
    """The function as a graph, compiled once a process; the function itself where this torch cannot."""
    return _quietly(torch.jit.script, function)


@cache
def traced(function: Graph, *example: torch.dtype) -> Graph:
    """Likewise a function of (B,) tensors of these types, that has no branches."""
    tensors = tuple(torch.ones(1, dtype=dtype) for dtype in example)
    return _quietly(partial(torch.jit.trace, example_inputs=tensors, check_trace=False), function)


def _quietly(compiler: Graph, function: Graph) -> Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            graph: Graph = compiler(function)
        except Exception:  # noqa: BLE001  a front end that has gone fails in any way
            return function
    return graph


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The array's own memory as a tensor; a copy where it may not be written to, which torch would warn of."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
