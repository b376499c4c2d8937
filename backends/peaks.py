"""What this host can do at best, measured: the bounds that a kernel's speed is held against."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import tvm_target
from paring.backends.runtime import flat_tensor
from paring.backends.targets import Target
from paring.backends.threads import THREADS, get_num_threads, set_num_threads
from paring.ir.op import Array

# How long each peak is looked for: long enough for both threads to be moved to cores of their own, and for others to make way.
STRETCH_S = 0.3


@functools.cache
def peak_flops(target: Target, threads: int) -> float:
    """Float32 operations a second that chains of multiply-adds reach here: two for each, on `threads` threads."""
    lanes, chains, turns = target.lanes, max(8, target.registers // 2), 1 << 16
    with IRBuilder() as builder, T.prim_func():
        T.func_name("peak")
        given = T.arg("given", T.Buffer((2 * lanes,), "float32"))
        result = T.arg("result", T.Buffer((threads * chains * lanes,), "float32"))
        all_lanes = tirx.Ramp(tirx.const(0, "int32"), 1, lanes)
        with T.parallel(0, threads) as thread:
            # A buffer each, of scope "global": small ones of that scope lie on the stack, where LLVM makes registers of them.
            sums = [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(chains)]
            factor, term = (T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(2))
            for position, register in enumerate((factor, term, *sums)):
                start = position % 2 * lanes
                T.buffer_store(register, given[tirx.Ramp(tirx.const(start, "int32"), 1, lanes)], [all_lanes])
            with T.serial(0, turns):
                for register in sums:
                    T.buffer_store(register, register[all_lanes] * factor[all_lanes] + term[all_lanes], [all_lanes])
            for position, register in enumerate(sums):
                where = tirx.Ramp((thread * chains + position) * lanes, 1, lanes)
                T.buffer_store(result, register[all_lanes], [where])
    arrays = [np.full(2 * lanes, 0.5, "float32"), np.zeros(threads * chains * lanes, "float32")]
    return 2.0 * lanes * chains * turns * threads / _fastest(builder.get(), target, threads, arrays)


@functools.cache
def bandwidth(target: Target, threads: int) -> float:
    """Bytes a second, read and written together, that a copy of arrays larger than any cache reaches here."""
    elements = 1 << 24
    each = elements // threads // target.lanes
    with IRBuilder() as builder, T.prim_func():
        T.func_name("copy")
        source = T.arg("source", T.Buffer((elements,), "float32"))
        result = T.arg("result", T.Buffer((elements,), "float32"))
        with T.parallel(0, threads) as thread, T.serial(0, each) as i:
            where = tirx.Ramp((thread * each + i) * target.lanes, 1, target.lanes)
            T.buffer_store(result, source[where], [where])
    moved = 2.0 * 4 * threads * each * target.lanes
    return moved / _fastest(builder.get(), target, threads, [np.zeros(elements, "float32"), np.zeros(elements, "float32")])


def _fastest(function: tirx.PrimFunc, target: Target, threads: int, arrays: Sequence[Array]) -> float:
    """Seconds of the fastest of some calls on this host, with that many threads."""
    name = str(function.attrs["global_symbol"])
    call = tvm.compile(tvm.IRModule({name: function}), target=tvm_target(target))[name]
    tensors = [flat_tensor(array) for array in arrays]

    def measure() -> float:
        times = []
        stop = time.perf_counter() + STRETCH_S
        while len(times) < 20 or time.perf_counter() < stop:
            start = time.perf_counter()
            call(*tensors)
            times.append(time.perf_counter() - start)
        return min(times)

    before = get_num_threads()
    set_num_threads(threads)
    try:
        return THREADS.run(measure)
    finally:
        set_num_threads(before)
