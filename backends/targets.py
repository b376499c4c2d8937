"""Targets as data. A new target is one entry here and, where its hardware has an instruction of its own, one intrinsic."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, replace

import psutil

from paring.ir.errors import ArgumentError, nearest

# Pixels of a tile of sparse layers that store single weights. Measured on Zen 4, 256 channels: 1.4 cycles for each multiply-add
# of 16 lanes; 1.7 with 32 pixels, 2.0 with 192.
PIXELS = 64


@dataclass(frozen=True)
class Target:
    """What the schedules, the passes' options and the linker need to know of a machine.

    `elf_machine`: what the ELF header of its libraries says. `lanes`: float32 elements of a vector register. `registers`:
    vector registers. `l1`, `l2`: data caches of one core, bytes. `block`: channels of a blocked layout. `dot`: the
    instructions that sum products of bytes, a name in `schedules/dot.py`, and `group` the channels that they take at a time;
    `winograd`: how many products of two 16-bit channels take as long as one of these, and 0 where no schedule has them.
    `list_start`, `gather`: what sparse layers take beside multiply-adds, in multiply-adds of a vector: to start a list, and to
    gather a vector of pixels; `entry`: what an entry of 8-bit integers takes, in steps of the dense layer, which prepares pixels
    once for two blocks of outputs. `paring bench --suite sparse` shows what comes of them.
    `tables`: those that look bytes up in registers, a name in `tables.py`. `needs`: CPU flags that the running host must have.
    `clock`, in Hz, and `bandwidth` of memory, bytes a second: nominal.
    `device`: "host" where this machine runs its code, "" where a device must be given. `linker`: the cross compiler, with the
    Debian package that has it; empty for the host's own.
    """

    name: str
    arch: str
    cpu: str
    triple: str
    elf_machine: int
    lanes: int
    registers: int
    block: int
    dot: str = ""
    group: int = 1
    winograd: float = 0.0
    tables: str = ""
    list_start: float = 14.0
    gather: float = 10.0
    entry: float = 1.15
    features: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    clock: float = 2.5e9
    bandwidth: float = 20e9
    l1: int = 32 * 1024
    l2: int = 512 * 1024
    cores: int = 2
    device: str = "host"
    linker: str = ""
    linker_package: str = ""
    pipeline: str = "blocked"

    @property
    def flops(self) -> float:
        """Float32 operations a second at best: two units of multiply-adds on each core."""
        return 4.0 * self.lanes * self.clock * self.cores

    def pipeline_options(self) -> dict[str, object]:
        """What the target's pipeline may name in braces."""
        return {
            **{"block": self.block, "group": self.group, "span": self.span, "pixels": PIXELS},
            **{"start": self.list_start, "gather": self.gather, "entry": self.entry},
            **{"winograd": self.winograd, "far": self.far},
        }

    @property
    def far(self) -> float:
        """Cycles of all cores for a byte from memory."""
        return self.clock * self.cores / self.bandwidth

    @property
    def span(self) -> int:
        """Input channels of which a tile of PIXELS stays in the first cache, in whole blocks."""
        return max(1, self.l1 // (4 * PIXELS * self.block)) * self.block


_X86 = "x86_64-linux-gnu"
_ARM = "aarch64-linux-gnu"

REFERENCE = Target("reference", "any", "", "", elf_machine=0, lanes=1, registers=1, block=1, pipeline="none")

_AVX2 = Target(
    *("x86-avx2", "x86_64", "x86-64-v3", _X86),
    elf_machine=62,
    lanes=8,
    registers=16,
    block=8,
    dot="madd",
    group=4,
    winograd=2.0,
    needs=("avx2", "fma"),
)
_AVX512 = Target(
    *("x86-avx512", "x86_64", "x86-64-v4", _X86),
    elf_machine=62,
    lanes=16,
    registers=32,
    block=16,
    dot="madd",
    group=4,
    winograd=2.0,
    tables="vpermi2d",
    features=("-prefer-256-bit",),
    needs=("avx512f", "avx512dq", "avx512bw", "avx512vl"),
    l2=1024 * 1024,
)

_ARM64 = Target(
    "arm",
    "aarch64",
    "cortex-a76",
    _ARM,
    elf_machine=183,
    lanes=4,
    registers=32,
    block=8,
    dot="sdot",
    group=4,
    tables="tbl",
    l1=64 * 1024,
    needs=("asimddp", "asimdhp", "atomics"),
    device="",
    linker="aarch64-linux-gnu-g++",
    linker_package="g++-aarch64-linux-gnu",
)

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        REFERENCE,
        _AVX2,
        replace(
            _AVX2,
            name="x86-avx2-vnni",
            dot="vnni",
            winograd=1.0,
            entry=1.0,
            features=("+avxvnni",),
            needs=(*_AVX2.needs, "avx_vnni"),
        ),
        _AVX512,
        replace(
            _AVX512,
            name="x86-vnni",
            dot="vnni",
            entry=1.0,
            winograd=1.0,
            features=(*_AVX512.features, "+avx512vnni"),
            needs=(*_AVX512.needs, "avx512_vnni"),
        ),
        _ARM64,
        replace(_ARM64, name="arm-neon", cpu="cortex-a72", dot="widen", needs=("asimd",)),
    )
}

# Names that stand for the best entry this host can run, first match wins.
ALIASES: dict[str, tuple[str, ...]] = {
    "native": ("x86-vnni", "x86-avx512", "x86-avx2-vnni", "x86-avx2", "arm", "arm-neon"),
    "x86": ("x86-vnni", "x86-avx512", "x86-avx2-vnni", "x86-avx2"),
}


def names() -> list[str]:
    """All names that `resolve` takes."""
    return [*ALIASES, *TARGETS]


def host_arch() -> str:
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def host_flags() -> frozenset[str]:
    """CPU flags of this host as Linux names them; empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def missing_flags(target: Target) -> list[str]:
    """CPU flags that this host lacks to run the target's code."""
    if target.arch not in ("any", host_arch()):
        return [target.arch]
    flags = host_flags()
    return [flag for flag in target.needs if flag not in flags]


def resolve(name: str) -> Target:
    """The target of that name, an alias settled for this host. Raises ArgumentError with the nearest name."""
    if name in TARGETS:
        return for_host(TARGETS[name])
    if name not in ALIASES:
        known = f"known: {', '.join(names())}"
        raise ArgumentError(f"unknown target {name!r}", hint=f"{nearest(name, names(), '')} {known}".lstrip())
    for candidate in ALIASES[name]:
        if not missing_flags(TARGETS[candidate]):
            return for_host(TARGETS[candidate])
    # A foreign host: the least demanding entry can still be built where there is a linker, and saved.
    here = [candidate for candidate in ALIASES[name] if TARGETS[candidate].arch == host_arch()]
    return for_host(TARGETS[(here or ALIASES[name])[-1]])


# Where a device behind TVM's RPC server is.
RPC = re.compile(r"rpc://(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})")
EMULATED = "aarch64"


def check_device(target: Target, device: object) -> None:
    """Raise ArgumentError for the name of a device that does not exist, or never runs code for the target."""
    if device is None or not isinstance(device, str) or device == "host":
        return
    if device != "emulator" and not RPC.fullmatch(device):
        raise ArgumentError(f"unknown device {device!r}", hint='"host", "emulator" or "rpc://HOST:PORT"')
    if target.name == REFERENCE.name:
        raise ArgumentError("the reference interpreter runs on this host only", hint=f"leave out the device {device!r}")
    if device == "emulator" and target.arch != EMULATED:
        what = f"the emulator runs code for arm, this network is for {target.name}"
        raise ArgumentError(what, hint="leave the device out, or compile for target='arm'")


def for_host(target: Target) -> Target:
    """The target with this host's core count and linker where the host can run it, else as one that runs elsewhere."""
    if target.arch == host_arch():
        target = replace(target, linker="", linker_package="")
    if missing_flags(target):
        return replace(target, device="")
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return replace(target, cores=cores, device="host")
