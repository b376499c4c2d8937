"""What stands for a model's own output class that is a tuple, in a loaded network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class TupleRecord(tuple[Any, ...]):
    """A tuple whose entries are attributes too: what stands for a namedtuple or one of torch.return_types.

    Entries lie in the instance, so one named `count` or `index` hides the method of that name, as it does in a namedtuple.
    """

    def __new__(cls, class_name: str, names: Sequence[str], values: Iterable[Any]) -> TupleRecord:
        self = super().__new__(cls, values)
        self.__dict__.update(zip(names, self, strict=True), _class_name=class_name, _fields=tuple(names))
        return self

    def __repr__(self) -> str:
        return f"{self._class_name}({', '.join(f'{n}={v!r}' for n, v in zip(self._fields, self, strict=True))})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TupleRecord, (self._class_name, self._fields, tuple(self))

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    # Known to type checkers only: both lie in the instance.
    _class_name: str
    _fields: tuple[str, ...]
