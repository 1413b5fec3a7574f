"""Where the operations of each graph run, as ggml's scheduler tells it.

With GGML_SCHED_DEBUG=2 ggml logs every graph that it lays out: runs of operations on one device ("splits"),
and what is copied to that device before each of them. An operation that a device does not know is a split on
the CPU, with copies before and after it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_VARIABLE = "GGML_SCHED_DEBUG"
_SPLIT = re.compile(r"## SPLIT #(\d+): (\S+) # (\d+) inputs")
_NODE = re.compile(r"node #\s*\d+ \(\s*(\S+)\):\s*(\S*) \(")


@dataclass
class Split:
    """Operations that one device runs, one after the other.

    n_inputs:   tensors that are copied to the device before
    operations: (the first 10 letters of ggml's name of the operation, the first 20 of its result's)
    """

    device: str
    n_inputs: int
    operations: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Graph:
    """What the scheduler has made of one graph."""

    splits: list[Split] = field(default_factory=list)

    def operations_on(self, device: str) -> list[tuple[str, str]]:
        """The operations that a device runs, in order."""
        return [
            operation for split in self.splits if split.device == device for operation in split.operations
        ]

    def __str__(self) -> str:
        return " | ".join(f"{len(split.operations)} on {split.device}" for split in self.splits)


class _Reader(logging.Handler):
    """Builds graphs from the lines of the log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.graphs: list[Graph] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if found := _SPLIT.search(line):
            if found[1] == "0":
                self.graphs.append(Graph())
            self.graphs[-1].splits.append(Split(found[2], int(found[3])))
        elif self.graphs and (found := _NODE.search(line)):
            # What only names other memory is not work.
            self.graphs[-1].splits[-1].operations.append((found[1], found[2]))


@contextmanager
def watched_graphs() -> Iterator[list[Graph]]:
    """The graphs that models lay out in this process, in order. Open the model inside, for a context tells
    only if it was made inside. A graph that serves again is not told again."""
    logger = logging.getLogger("mllama_gguf.native")
    reader, level, before = _Reader(), logger.level, os.environ.get(_VARIABLE)
    logger.addHandler(reader)
    logger.setLevel(logging.DEBUG)
    os.environ[_VARIABLE] = "2"
    try:
        yield reader.graphs
    finally:
        logger.removeHandler(reader)
        logger.setLevel(level)
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
