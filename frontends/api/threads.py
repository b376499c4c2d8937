"""How many threads kernels use, for the whole process."""

from __future__ import annotations


def set_num_threads(count: int) -> None:
    """Use `count` threads from now on. Raises ArgumentError unless it is a positive int."""
    from paring.backends import runtime

    runtime.set_num_threads(count)


def get_num_threads() -> int:
    from paring.backends import runtime

    return runtime.get_num_threads()
