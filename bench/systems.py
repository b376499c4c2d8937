"""All systems by name, and which of them are compared at a precision."""

from __future__ import annotations

from collections.abc import Sequence

from paring.bench.peers import PEERS, Peer
from paring.bench.peers_int8 import INT8_PEERS
from paring.bench.variants import variant

SYSTEMS: dict[str, Peer] = {**PEERS, **INT8_PEERS}
# What Paring is compared with unless told otherwise.
COMPARED = {"float32": ("eager", "inductor", "ort", "openvino"), "int8": ("ort", "openvino")}


def system_of(name: str) -> Peer:
    """The system of a name; what is no name of one is passes that Paring runs."""
    return SYSTEMS[name] if name in SYSTEMS else variant(name)


def at_precision(peers: Sequence[str], precision: str) -> tuple[str, ...]:
    """Paring and its peers, those of COMPARED by default; at int8 Paring's own float32 comes last. Raises KeyError."""
    if precision not in COMPARED:
        raise KeyError(f"no precision {precision!r}; there are: {', '.join(COMPARED)}")
    known = {name.removesuffix("-int8"): name for name in (INT8_PEERS if precision == "int8" else PEERS)}
    names = ("paring", *(name for name in peers or COMPARED[precision] if name != "paring"))
    for name in names:
        if name not in known:
            raise KeyError(f"no system {name!r} at {precision}; there are: {', '.join(known)}")
    return (*(known[name] for name in names), *(("paring",) if precision == "int8" else ()))
