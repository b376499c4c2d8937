"""Whether pruning pays: layers that became slower are given channels back, and what multiply-adds saved has become of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from paring.ir.graph import Graph, Node
from paring.passes.compress.channels.families import Families, Family
from paring.passes.ledger import NETWORK, SHOWN_LAYERS
from paring.passes.machine import Time, Timing, modelled
from paring.passes.rewriter import Context
from paring.passes.util import module_of

# A layer counts as slower by more than this share of its time, and of that of the network: less is chance.
SLOWER = 0.1
SLOWER_OF_ALL = 0.002
# The whole network, looked at twice.
SLOWER_NETWORK = 0.01
# How often sizes are raised before what is slow still is put back.
ROUNDS = 3


def timer(context: Context, measure: bool | None = None) -> Time:
    """Measures a graph where the machine is at hand and `measure` is not False, else models it."""
    measured = None if measure is False else context.time
    return measured or (lambda graph: modelled(graph, context.machine))


def keep_what_pays(families: Families, keep: Sequence[int], context: Context) -> list[int]:
    """How many groups stay of each family so that what was pruned is not slower than it was, nor the network.

    Where a layer is slower, and with it all layers together that make or read the family at fault, the family is widened to
    the next level that fills blocks, and after some rounds put back. What was undone, by how much it was slower, and the
    conversion efficiency of what is left go into the ledger.
    """
    time, dense, found = timer(context), families.channels.flow.graph, list(keep)
    if found == families.dense:
        return found
    context.tell("time", 0, ROUNDS + 2)
    before, now = time(dense), time(families.graph(found))
    for turn in range(1, ROUNDS + 2):
        context.tell("time", turn, ROUNDS + 2)
        guilty = _guilty(families, found, before, now)
        if not guilty:
            break
        for place, layer in guilty.items():
            _widen(families, found, place, _said(layer, before, now), context, back=turn > ROUNDS)
        now = time(families.graph(found))
    if now.seconds > before.seconds:
        # A second look, so that chance does not undo everything.
        now = min(now, time(families.graph(found)), key=lambda timing: timing.seconds)
    if now.seconds > before.seconds * (1 + SLOWER_NETWORK):
        said = f"{now.seconds * 1e3:.3f} ms pruned, {before.seconds * 1e3:.3f} ms before"
        context.notes.append(f"undone: the whole network is slower, {said}")
        return families.dense
    _account(families, found, before, now, context)
    return found


def _account(families: Families, keep: Sequence[int], before: Timing, now: Timing, context: Context) -> None:
    """What the ledger says of a network that stays pruned."""
    dense, pruned = families.channels.flow.graph, families.graph(keep)
    context.conversion.update(conversion(dense, pruned, before, now))
    how = "measured, of the float network" if now.measured else "modelled, of the float network: the target is not at hand"
    faster, fewer = before.seconds / now.seconds, _ratio(_macs(dense), _macs(pruned))
    context.notes.append(f"{faster:.2f} times as fast for {fewer:.2f} times fewer multiply-adds ({how})")
    reduced = {name for p, family in enumerate(families.families) if keep[p] < len(family) for name in _touched(families, family)}
    still = [name for name in slower(before, now) if name in reduced]
    if still:
        shown = ", ".join(_said(layer, before, now) for layer in still[:SHOWN_LAYERS])
        context.notes.append(f"slower, but layers that hang on them are faster by more: {len(still)} layers, of which {shown}")


def _said(layer: str, before: Timing, now: Timing) -> str:
    return f"{layer} takes {now.layers[layer] * 1e6:.1f} us pruned, {before.layers[layer] * 1e6:.1f} us before"


def _guilty(families: Families, keep: Sequence[int], before: Timing, now: Timing) -> dict[int, str]:
    """The families that do not pay, by their place, each with the layer that is slower by most."""
    found: dict[int, str] = {}
    for layer in slower(before, now):
        for place in _responsible(families, keep, layer):
            names = _touched(families, families.families[place])
            was, became = (sum(timing.layers.get(name, 0.0) for name in names) for timing in (before, now))
            if became > was:
                found.setdefault(place, layer)
    return found


def slower(before: Timing, now: Timing) -> dict[str, tuple[float, float]]:
    """By module the seconds before and now of layers that became slower, those by most first."""
    pairs = {name: (was, now.layers[name]) for name, was in before.layers.items() if name in now.layers}
    least = SLOWER_OF_ALL * before.seconds
    slow = {n: (was, became) for n, (was, became) in pairs.items() if became - was > max(SLOWER * was, least)}
    return dict(sorted(slow.items(), key=lambda item: item[1][0] - item[1][1]))


def conversion(dense: Graph, pruned: Graph, before: Timing, now: Timing) -> dict[str, float]:
    """Conversion efficiency: how many times as fast, over how many times fewer multiply-adds.

    Of the network, and by module of each layer that has fewer.
    """
    old, new = _macs(dense), _macs(pruned)
    found = {NETWORK: before.seconds / now.seconds / _ratio(old, new)}
    for name, macs in new.items():
        timed = before.layers.get(name, 0.0) > 0 and now.layers.get(name, 0.0) > 0
        if timed and 0 < macs < old.get(name, 0):
            found[name] = before.layers[name] / now.layers[name] / (old[name] / macs)
    return found


def _ratio(old: Mapping[str, int], new: Mapping[str, int]) -> float:
    return sum(old.values()) / max(1, sum(new.values()))


def _macs(graph: Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.nodes():
        if node.macs:
            found[module_of(node)] = found.get(module_of(node), 0) + node.macs
    return found


def _widen(families: Families, keep: list[int], place: int, said: str, context: Context, back: bool) -> None:
    """Give a family channels back: as many as fill blocks, or all."""
    family, old = families.families[place], keep[place]
    keep[place] = len(family) if back else _next_cheaper(family, old, context.machine.block)
    full = keep[place] == len(family)
    became = "put back" if full else f"rounded up to {family.width(keep[place])} of {family.width(len(family))} channels"
    context.notes.append(f"undone: {family.width(old)} channels of {family.name} ({said}): {became}")


def _next_cheaper(family: Family, count: int, block: int) -> int:
    """The next level that fills whole blocks of the machine; all groups where there is none."""
    wider = [level for level in reversed(family.levels) if level > count]
    return next((level for level in wider if family.width(level) % block == 0), len(family))


def _responsible(families: Families, keep: Sequence[int], name: str) -> list[int]:
    """The families that lost groups and make a layer's channels; where there are none, those that it reads."""
    reduced = [place for place, family in enumerate(families.families) if keep[place] < len(family)]
    own = [p for p in reduced if any(module_of(layer) == name for layer in families.families[p].layers)]
    return own or [p for p in reduced if not _numbers(families.families[p]).isdisjoint(_read(families, name))]


def _touched(families: Families, family: Family) -> set[str]:
    """The modules of the layers that make or read a family's channels."""
    numbers = _numbers(family)
    readers = (layer for layer in families.channels.flow.layers if not numbers.isdisjoint(families.read_by(layer)))
    return {module_of(layer) for layer in (*family.layers, *readers)}


def _numbers(family: Family) -> set[int]:
    return {group.number for group in family.groups}


def _read(families: Families, name: str) -> set[int]:
    """The numbers of groups in what the layers of a module read."""
    return {number for node in _of_module(families, name) for number in families.read_by(node)}


def _of_module(families: Families, name: str) -> Iterator[Node]:
    return (layer for layer in families.channels.flow.layers if module_of(layer) == name)
