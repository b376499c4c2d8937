"""Paring: pares a network down, and compiles what is left.

```python
net = paring.compile(model, (x,), target="x86")   # a torch module, an exported program, an fx graph or an IR graph
y = net(x)
print(net.ledger); net.save("net.paring"); net = paring.load("net.paring")
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paring.artifacts import inspect, load
    from paring.compiler import compile
    from paring.network import Network
    from paring.threads import get_num_threads, set_num_threads
    from paring.trainable import from_torch, to_torch

__version__ = "0.1.0"

# torch and TVM take seconds to import: each name brings in only what it needs, when it is first used.
_LAZY = {
    "compile": "paring.compiler",
    "Network": "paring.network",
    "load": "paring.artifacts",
    "inspect": "paring.artifacts",
    "set_num_threads": "paring.threads",
    "get_num_threads": "paring.threads",
    "to_torch": "paring.trainable",
    "from_torch": "paring.trainable",
}
_MODULES = ("autotune", "backends", "errors", "frontends", "ir", "passes", "testing")

__all__ = [
    "Network",
    "__version__",
    "compile",
    "from_torch",
    "get_num_threads",
    "inspect",
    "load",
    "set_num_threads",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"paring.{name}")
    raise AttributeError(f"module 'paring' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
