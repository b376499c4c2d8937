"""One model in one system in one process: prepares it, checks its answer, then runs the rounds it is asked for."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paring.bench.protocol import Message, serve

if TYPE_CHECKING:
    import numpy as np

# A system that answers wrongly sets no target. This catches garbage; accuracy is what coverage.py measures. Networks of random
# weights lose more to 8 bits than trained ones.
TOLERANCE = {"float32": 1e-2, "int8": 0.5, "changed": sys.float_info.max}


class Worker:
    def __init__(self, model: str, system: str, threads: int) -> None:
        self.model, self.system, self.threads = model, system, threads
        self.run: Callable[[], object] | None = None

    def prepare(self, small: bool = False) -> Message:
        import torch

        from paring.bench.models import MODELS
        from paring.bench.systems import system_of

        peer = system_of(self.system)
        module, inputs = MODELS[self.model].build(small)
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            expected = arrays(module(*inputs))
        start = perf_counter()
        self.run = peer.prepare(module, inputs, self.threads)
        actual = arrays(self.run())
        seconds = perf_counter() - start
        error = worst_difference(actual, expected)
        if not error <= TOLERANCE[peer.precision]:
            raise ArithmeticError(f"wrong answer: off by {error:.2g} of the largest value")
        return {"seconds": seconds, "difference": error, "macs": getattr(self.run, "macs", 0)}

    def round(self, seconds: float = 1.0, iterations: int = 0) -> Message:
        """Times in ms, for so many seconds (once at least) or iterations, after a warm-up of a fifth of that time."""
        if self.run is None:
            raise RuntimeError("'round' came before 'prepare'")
        run = self.run
        times: list[float] = []
        gc.collect()
        gc.disable()
        try:
            warm = perf_counter() + seconds / 5
            run()
            while perf_counter() < warm:
                run()
            stop = perf_counter() + seconds
            while not times or (len(times) < iterations if iterations else perf_counter() < stop):
                start = perf_counter()
                run()
                times.append((perf_counter() - start) * 1e3)
        finally:
            gc.enable()
        return {"times_ms": times}


def arrays(result: object) -> list[np.ndarray[Any, Any]]:
    """The tensors of any system's result, in order, as numpy."""
    import numpy as np
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(result)]
    return [leaf.numpy() if hasattr(leaf, "numpy") else np.asarray(leaf) for leaf in leaves if leaf is not None]


def worst_difference(actual: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]]) -> float:
    """Largest difference of any output, relative to its largest value; infinite where shapes or numbers disagree."""
    import numpy as np

    if [a.shape for a in actual] != [e.shape for e in expected]:
        return float("inf")
    pairs = zip(actual, expected, strict=True)
    each = [np.max(np.abs(a - e)) / max(np.max(np.abs(e)), 1e-30) for a, e in pairs]
    worst = float(np.max(each))  # unlike max(), passes a NaN on
    return worst if np.isfinite(worst) else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paring.bench.worker", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parent", type=int, default=0, help="end when this process ends")
    options = parser.parse_args()
    worker = Worker(options.model, options.system, options.threads)
    serve({"prepare": worker.prepare, "round": worker.round}, options.parent)


if __name__ == "__main__":
    main()
