"""Compiled networks as callers meet them: results, inputs of every kind, threads, life cycle."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest

from paring.ir.errors import ArgumentError, InputError, ParingError, TargetError
from paring.ir.graph import Graph, Loc, Node
from paring.ir.interpreter import interpret
from paring.ir.ops.binary import Add, Greater, Mul, Where
from paring.ir.ops.core import Const, Input
from paring.ir.ops.linear import Linear
from paring.ir.ops.shape import Broadcast, Reshape, Transpose
from paring.ir.ops.unary import Cast, Neg, Relu

pytest.importorskip("tvm")

from paring.backends import build as build_module
from paring.backends import emulator_build, peaks, threads
from paring.backends.build import Built, build
from paring.backends.devices import open_executable
from paring.backends.runtime import Executable, Network
from paring.backends.targets import TARGETS, resolve
from paring.backends.threads import get_num_threads, set_num_threads

NATIVE = resolve("native")
RNG = np.random.default_rng(0)


def small(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Small integers: float32 results are exact."""
    return RNG.integers(-4, 5, shape).astype(dtype)


def variable(*shape: int, dtype: str = "float32", label: str = "x") -> Node:
    return Node(Input(label, dtype, shape))


def network() -> Graph:
    """Shared, repeated and viewed outputs, weights, casts, and an output that is an input."""
    x, y = variable(4, 6), variable(4, 6, label="y")
    row = Node(Broadcast((4, 6)), (Node(Const(small(6))),), Loc("body.scale", "net.py:3"))
    h = Node(Relu(), (Node(Add(), (x, row)),))
    picked = Node(Where(), (Node(Greater(), (x, y)), h, y))
    turned = Node(Transpose((1, 0)), (picked,))
    view = Node(Reshape((3, 8)), (turned,))
    whole = Node(Cast("int32"), (Node(Mul(), (picked, h)),))
    return Graph((x, y), (turned, view, whole, x, h, turned, row.inputs[0], Node(Neg(), (view,))))


@pytest.fixture(scope="module")
def built() -> Built:
    return build(network(), NATIVE)


@pytest.fixture
def net(built: Built) -> Iterator[Executable]:
    with Executable(built) as executable:
        yield executable  # type: ignore[misc]


def agree(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


def test_results_are_those_of_the_reference(net: Executable) -> None:
    for _ in range(3):
        arrays = [small(4, 6), small(4, 6)]
        agree(net.run(arrays), interpret(net.built.graph, arrays))


def test_results_are_fresh(net: Executable) -> None:
    arrays = [small(4, 6), small(4, 6)]
    first = net.run(arrays)
    for position, array in enumerate(first):
        others = [*first[:position], *first[position + 1 :], *arrays, net.built.plan.weights[0].value]
        assert not any(np.shares_memory(array, other) for other in others)
        array[...] = 77
    agree(net.run(arrays), interpret(net.built.graph, arrays))
    kept = net.run(arrays)
    again = [array.copy() for array in kept]
    net.run([small(4, 6), small(4, 6)])
    agree(kept, again)


def test_results_outlive_the_network(built: Built) -> None:
    arrays = [small(4, 6), small(4, 6)]
    net = Executable(built)
    results = net.run(arrays)
    net.close()
    del net
    gc.collect()
    agree(results, interpret(built.graph, arrays))


def aligned_to(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy of an array whose memory starts `offset` bytes behind a multiple of 64."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copied = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


def test_inputs_of_every_make(net: Executable) -> None:
    x, y = small(4, 6), small(4, 6)
    wanted = interpret(net.built.graph, [x, y])
    read_only = aligned_to(x, 0)
    read_only.flags.writeable = False
    makes = {
        "aligned": aligned_to(x, 0),
        "unaligned": aligned_to(x, 4),
        "read-only": read_only,
        "big-endian": x.astype(">f4"),
        "column-major": np.asfortranarray(x),
        "transposed": np.ascontiguousarray(x.T).T,
        "strided": np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
        "reversed": np.ascontiguousarray(x[::-1])[::-1],
        "misaligned": np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 6),
    }
    for name, made in makes.items():
        before = made.copy()
        agree(net.run([made, y]), wanted)
        np.testing.assert_array_equal(made, before, err_msg=name)
    expanded = np.broadcast_to(x[:1], (4, 6))
    agree(net.run([expanded, y]), interpret(net.built.graph, [np.ascontiguousarray(expanded), y]))
    aliased = aligned_to(x, 0)
    agree(net.run([aliased, aliased]), interpret(net.built.graph, [x, x]))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ([small(4, 6)], "expected 2 inputs, got 1"),
        ([small(4, 6)] * 3, "expected 2 inputs, got 3"),
        ([small(4, 6), small(4, 6, dtype="float64")], "input 1 (y) is float64[4,6], expected float32[4,6]"),
        ([small(6, 4), small(4, 6)], "input 0 (x) is float32[6,4], expected float32[4,6]"),
        ([small(4, 6), small(4, 6)[0]], "input 1 (y) is float32[6]"),
        ([[1.0], small(4, 6)], "input 0 (x) is a list"),
        ([np.zeros((4, 6), object), small(4, 6)], "input 0 (x) is object"),
        ([np.zeros((4, 6), "M8[s]"), small(4, 6)], "input 0 (x) is datetime64"),
    ],
)
def test_wrong_inputs_are_refused(net: Executable, arrays: list[np.ndarray], says: str) -> None:
    with pytest.raises(InputError) as error:
        net.run(arrays)
    assert says in str(error.value)


def test_empty_and_scalar_tensors_and_every_dtype() -> None:
    inputs = [variable(3, dtype=d, label=d) for d in ("float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")]
    empty, scalar = variable(0, 3), variable()
    same = [Node(Reshape((3, 1)), (n,)) for n in inputs]
    masks = [Node(Cast("bool"), (n,)) for n in inputs]
    graph = Graph((*inputs, empty, scalar), (*same, *masks, Node(Neg(), (empty,)), Node(Neg(), (scalar,)), empty))
    arrays = [*(small(3, dtype=n.type.dtype) for n in inputs), np.zeros((0, 3), "float32"), np.array(2, "float32")]
    with Executable(build(graph, NATIVE)) as net:
        agree(net.run(arrays), interpret(graph, arrays))


def test_a_network_without_kernels() -> None:
    x = variable(2, 3)
    graph = Graph((x,), (x, Node(Reshape((6,)), (x,))))
    with Executable(build(graph, NATIVE)) as net:
        array = small(2, 3)
        agree(net.run([array]), interpret(graph, [array]))
        assert net.profile([array], 1) == []


def test_closed_networks_refuse(built: Built) -> None:
    net = Executable(built)
    net.close()
    net.close()
    arrays = [small(4, 6), small(4, 6)]
    for call in (lambda: net.run(arrays), lambda: net.profile(arrays), lambda: list(net.trace(arrays))):
        with pytest.raises(InputError, match="closed"):
            call()


def test_networks_are_not_pickled(net: Executable) -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ParingError, match=r"\.save\(\)"):
            copied(net)


def test_a_forked_child_is_refused(net: Executable) -> None:
    arrays = [small(4, 6), small(4, 6)]
    net.run(arrays)
    child = os.fork()
    if not child:
        try:
            net.run(arrays)
        except InputError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_threads_take_turns(net: Executable) -> None:
    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(100):
            arrays = [rng.integers(-4, 5, (4, 6)).astype("float32") for _ in range(2)]
            agree(net.run(arrays), interpret(net.built.graph, arrays))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_threads_that_come_and_go_leave_nothing(net: Executable) -> None:
    arrays = [small(4, 6), small(4, 6)]

    def call_from_new_threads(count: int) -> int:
        for _ in range(count):
            thread = threading.Thread(target=net.run, args=(arrays,))
            thread.start()
            thread.join()
        return psutil.Process().num_threads()

    # A thread that has been joined may be counted for a moment more.
    assert call_from_new_threads(30) <= call_from_new_threads(3) + 5


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = get_num_threads()
    yield
    set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_the_number_of_threads(net: Executable) -> None:
    import tvm

    arrays = [small(4, 6), small(4, 6)]
    used = tvm.get_global_func("runtime.NumThreads")
    for count in {1, 2, threads.THREADS.most} & set(range(1, threads.THREADS.most + 1)):
        set_num_threads(count)
        assert get_num_threads() == count
        net.run(arrays)
        assert used() == count
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: threads.THREADS.run(used)).result() == count


@pytest.mark.usefixtures("restored_threads")
def test_other_numbers_of_threads_leave_the_caller_its_cores(net: Executable) -> None:
    """A caller that is left on one core has its workers there too, from then on."""
    cores = os.sched_getaffinity(0)
    for count in (1, min(2, threads.THREADS.most), 1):
        set_num_threads(count)
        net.run([small(4, 6), small(4, 6)])
        assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("count", [0, -1, 10**6, 1.5, True, "2", None])
def test_impossible_numbers_of_threads(count: object) -> None:
    before = get_num_threads()
    with pytest.raises(ArgumentError, match="number of threads"):
        set_num_threads(count)  # type: ignore[arg-type]
    assert get_num_threads() == before


def test_trace_gives_each_result(net: Executable) -> None:
    arrays = [small(4, 6), small(4, 6)]
    steps = list(net.trace(arrays))
    nodes = [step.node for step, _ in steps]
    wanted = interpret(Graph(net.built.graph.inputs, tuple(nodes)), arrays)
    agree([array for _, array in steps], wanted)


def test_profile_names_kernels_and_their_work() -> None:
    x = variable(8, 32)
    weight = Node(Const(small(16, 32)))
    graph = Graph((x,), (Node(Relu(), (Node(Linear(), (x, weight), Loc("head", "net.py:9")),)),))
    with Executable(build(graph, NATIVE)) as net:
        linear, relu = net.profile([small(8, 32)], 5)
    assert (linear.kind, linear.macs, str(linear.loc)) == ("linear", 8 * 16 * 32, "head (net.py:9)")
    assert linear.bytes == 4 * (8 * 32 + 16 * 32 + 8 * 16)
    assert relu.bytes == 2 * 4 * 8 * 16
    assert linear.ns > 0
    with pytest.raises(ArgumentError):
        net.profile([small(8, 32)], 0)


def test_peaks_of_the_machine() -> None:
    assert 1e8 < peaks.peak_flops(NATIVE, 1) < 1e13
    assert 1e7 < peaks.bandwidth(NATIVE, 1) < 1e13


def test_equal_kernels_are_built_once_and_libraries_are_reproducible() -> None:
    x = variable(4, 6)
    h = x
    for op in (Neg(), Relu(), Neg(), Relu(), Neg()):
        h = Node(op, (h,))
    seen: list[tuple[int, int, str]] = []
    graph = Graph((x,), (Node(Transpose((1, 0)), (h,)),))
    first = build(graph, NATIVE, lambda *now: seen.append(now))
    names = {name for _, _, name in seen}
    # neg is needed twice: once with memory of its own, then in place.
    assert len(names) == 4
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == 8
    assert build(graph, NATIVE).library == first.library


def test_no_linker_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module.shutil, "which", lambda name: None)
    for target in (NATIVE, TARGETS["arm"]):
        with pytest.raises(TargetError, match=r"g\+\+"):
            build(network(), target)


def test_a_foreign_network_needs_a_device(built: Built) -> None:
    foreign = replace(built, target=TARGETS["arm"])
    with pytest.raises(TargetError, match="device"):
        open_executable(foreign)
    with pytest.raises(TargetError, match="cannot run"):
        open_executable(foreign, device="host")
    with pytest.raises(ArgumentError, match="unknown device"):
        open_executable(built, device="emulater")


def test_a_device_that_fails(built: Built) -> None:
    class Broken:
        def load(self, library: object) -> Network:
            raise OSError("gone")

    with pytest.raises(TargetError, match="gone"):
        open_executable(built, device=Broken())  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="no device answers") as caught:
        open_executable(built, device="rpc://127.0.0.1:1")
    assert "rpc_server" in caught.value.hint
    with pytest.raises(ArgumentError, match="the emulator runs code for arm"):
        open_executable(built, device="emulator")


@pytest.mark.skipif(bool(emulator_build.missing()), reason=f"no emulated device: {emulator_build.missing()}")
def test_the_emulated_device_gives_the_same_bits() -> None:
    graph = network()
    arrays = [small(4, 6), small(4, 6)]
    with open_executable(build(graph, TARGETS["arm"]), device="emulator") as net:
        agree(net.run(arrays), interpret(graph, arrays))
        agree(net.run(arrays), interpret(graph, arrays))


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def growth(work: object, warm: int, turns: int) -> float:
    for _ in range(warm):
        work()  # type: ignore[operator]
    before = resident()
    for _ in range(turns):
        work()  # type: ignore[operator]
    return resident() / before - 1


def test_memory_does_not_grow_with_calls(net: Executable) -> None:
    arrays = [small(4, 6), small(4, 6)]
    assert growth(lambda: net.run(arrays), 500, 10_000) < 0.01


@pytest.mark.parametrize("turns", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_loading(built: Built, turns: int) -> None:
    arrays = [small(4, 6), small(4, 6)]

    def cycle() -> None:
        with Executable(built) as net:
            net.run(arrays)

    assert growth(cycle, 20, turns) < 0.01
    with open("/proc/self/maps") as maps:
        assert sum("lib.so" in line for line in maps) < 40


def test_a_caller_on_the_core_of_a_worker_leaves_it_for_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("this process may use one core only")
    first, second, *_ = sorted(before)
    monkeypatch.setattr(threads, "_current_core", lambda: second)
    with threads._on(frozenset({first})):
        assert os.sched_getaffinity(0) == {first}
    assert os.sched_getaffinity(0) == before
    with threads._on(frozenset({second})):
        assert os.sched_getaffinity(0) == before
