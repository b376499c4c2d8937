"""How many threads kernels use, and on which thread they are called.

TVM keeps a thread pool for each thread that calls it and never frees one. So calls are made on the main thread or on a
single thread of ours, which all other threads hand their calls to; there are at most two pools, however many threads come.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import psutil
import tvm

from paring.ir.errors import ArgumentError

R = TypeVar("R")


class Threads:
    """How many threads kernels use, in the whole process, and on which thread calls are made.

    TVM sizes a pool when a thread first calls it, so room for all CPUs is asked for beforehand (TVM_NUM_THREADS).
    """

    def __init__(self) -> None:
        given = os.environ.get("TVM_NUM_THREADS", "")
        cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
        self.count = int(given) if given.isdecimal() and int(given) else cores
        self.most = max(os.cpu_count() or 1, self.count)
        self.local = threading.local()
        self.lock = threading.Lock()
        self.helper: ThreadPoolExecutor | None = None
        # A forked child has none of its parent's threads.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self.helper, self.lock, self.local = None, threading.Lock(), threading.local()

    def run(self, work: Callable[[], R]) -> R:
        """`work()` on a thread that may call TVM, with the pool set up."""
        if threading.current_thread() is threading.main_thread() or getattr(self.local, "helper", False):
            return self._configured(work)
        with self.lock:
            if self.helper is None:
                self.helper = ThreadPoolExecutor(1, "paring", initializer=lambda: setattr(self.local, "helper", True))
        return self.helper.submit(self._configured, work).result()

    def _configured(self, work: Callable[[], R]) -> R:
        if getattr(self.local, "count", 0) != self.count:
            self.local.count = self.count
            # Mode -2: a core for each worker, of those that this process may use; the calling thread stays free. Free
            # workers were seen to share the caller's core for seconds while another one was idle. TVM sets the caller to
            # the cores of this list, and binds workers only where the list has one for each, idle ones included.
            cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
            with _environment(TVM_NUM_THREADS=str(self.most), TVM_BIND_THREADS="1"):
                tvm.get_global_func("runtime.config_threadpool")(-2, self.count, (cores * self.most)[: self.most])
            taken = {int(core) for core in (cores * self.count)[1 : self.count]}
            self.local.free = frozenset(map(int, cores)) - taken
        with _on(self.local.free):
            return work()


@contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    """Move the calling thread off the workers' cores: on one of these both would run in turns while another core is idle.

    It is bound only meanwhile, since threads that the user makes inherit it, and only if need be: it takes microseconds.
    """
    if _current_core() in cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, (before & cores) or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _current_core() -> int:
    return int(_LIBC.sched_getcpu())


_LIBC = ctypes.CDLL(None)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """TVM reads these when it makes a pool, and only then: child processes must not take them for the user's wish."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


THREADS = Threads()


def set_num_threads(count: int) -> None:
    """How many threads kernels use from the next call on, in this process. Raises ArgumentError out of range."""
    if type(count) is not int or not 1 <= count <= THREADS.most:
        raise ArgumentError(f"the number of threads is an int from 1 to {THREADS.most}, not {count!r}")
    THREADS.count = count


def get_num_threads() -> int:
    """How many threads kernels use; at first one for each physical core."""
    return THREADS.count
