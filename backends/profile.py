"""Where the time of a network goes: each kernel with its work, its bytes, its share of what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paring.backends.peaks import bandwidth, peak_flops
from paring.backends.runtime import KernelTime
from paring.backends.threads import get_num_threads
from paring.ir.errors import ArgumentError
from paring.ir.op import Array
from paring.ir.work import integers_line, saved_bytes


@dataclass(frozen=True)
class Row:
    """One kernel call. `bound` is what limits it, "flops" or "bytes"; `share` how much of that limit it reaches.

    `sqnr`: signal to quantization noise of the layer that it computes, in dB, where that was measured.
    """

    kernel: KernelTime
    bound: str
    share: float
    sqnr: float | None = None


@dataclass(frozen=True)
class Profile:
    """All kernels of a network in order. Peaks are measured on this host with the same threads: FLOP/s and bytes/s.

    Kernels are timed one by one on the network's own data; caches are as warm as the call before leaves them.
    `saved_bytes`: how much less its 8-bit weights take than they would in float32.
    """

    rows: tuple[Row, ...]
    threads: int
    peak_flops: float
    peak_bandwidth: float
    saved_bytes: int = 0

    @property
    def integer_share(self) -> float:
        """The share of multiply-adds that is of 8-bit integers; 0 where there are none at all."""
        macs = sum(row.kernel.macs for row in self.rows)
        return sum(row.kernel.integer_macs for row in self.rows) / macs if macs else 0.0

    @property
    def milliseconds(self) -> float:
        return sum(row.kernel.ns for row in self.rows) / 1e6

    def as_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            plain = asdict(row.kernel)
            plain["loc"] = str(row.kernel.loc) if row.kernel.loc else ""
            rows.append({**plain, "bound": row.bound, "share": row.share, "sqnr": row.sqnr})
        head = {"threads": self.threads, "peak_flops": self.peak_flops, "peak_bandwidth": self.peak_bandwidth}
        integers = {"integer_share": self.integer_share, "saved_bytes": self.saved_bytes}
        return {**head, **integers, "milliseconds": self.milliseconds, "kernels": rows}

    def __str__(self) -> str:
        total = sum(row.kernel.ns for row in self.rows)
        measured = any(row.sqnr is not None for row in self.rows)
        column = "  {:>7}".format if measured else "".format
        head = f"{'us':>9} {'%':>5} {'GFLOP/s':>8} {'GB/s':>6} {'share of peak':>14}"
        lines = [f"{head}{column('SQNR dB')}  {'kernel':<14} where in the model"]
        for row in self.rows:
            k = row.kernel
            share = f"{row.share:.0%} {row.bound}"
            noise = "" if row.sqnr is None else f"{row.sqnr:.1f}"
            lines.append(
                f"{k.ns / 1e3:>9.1f} {k.ns / total * 100:>5.1f} {2 * k.macs / k.ns:>8.1f} {k.bytes / k.ns:>6.1f} {share:>14}"
                f"{column(noise)}  {k.kind:<14} {k.loc or ''}"
            )
        peaks = f"{self.peak_flops / 1e9:.0f} GFLOP/s and {self.peak_bandwidth / 1e9:.0f} GB/s"
        lines.append(f"{total / 1e3:>9.1f} in all, {self.threads} threads; this host reaches {peaks}")
        if self.integer_share:
            lines.append(integers_line(self.integer_share, self.saved_bytes))
        if any(row.share > 1 for row in self.rows):
            lines.append(
                "over 100 %: multiply-adds on padding, and those that convolutions by tiles save, are counted but not computed; "
                "integers are held against floats; what is read may come from a cache"
            )
        return "\n".join(lines)


def profile(executable: Any, inputs: Sequence[Array], repeats: int, sqnr: Mapping[str, float] | None = None) -> Profile:
    """Time each kernel of an executable of this host; `sqnr`: of layers by name, in dB.

    Raises ArgumentError for an executable that runs elsewhere.
    """
    if not hasattr(executable, "profile"):
        raise ArgumentError("only networks that run on this host can be profiled", hint="compile for target='native'")
    threads = get_num_threads()
    target = executable.built.target
    flops, bytes_per_second = peak_flops(target, threads), bandwidth(target, threads)
    rows = []
    for kernel in executable.profile(inputs, repeats):
        for_flops, for_bytes = 2 * kernel.macs / flops * 1e9, kernel.bytes / bytes_per_second * 1e9
        bound, least = ("flops", for_flops) if for_flops > for_bytes else ("bytes", for_bytes)
        rows.append(Row(kernel, bound, least / max(kernel.ns, 1.0), _sqnr_of(kernel, sqnr or {})))
    return Profile(tuple(rows), threads, flops, bytes_per_second, saved_bytes(executable.built.graph))


def _sqnr_of(kernel: KernelTime, sqnr: Mapping[str, float]) -> float | None:
    """A layer goes by its module. One that is called several times has several figures, and none is this kernel's for sure."""
    name = kernel.loc.module if kernel.loc and kernel.integer_macs else ""
    return None if f"{name} #2" in sqnr else sqnr.get(name)
