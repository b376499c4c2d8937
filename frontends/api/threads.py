"""How many threads kernels use, for the whole process."""

from __future__ import annotations


def set_num_threads(count: int) -> None:
    """Use `count` threads from now on. Raises ArgumentError unless it is a positive int."""
    from paring.backends import threads

    threads.set_num_threads(count)


def get_num_threads() -> int:
    from paring.backends import threads

    return threads.get_num_threads()
