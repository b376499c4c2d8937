"""Options of passes: they read back from text, and what is out of range is refused where the pass is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paring.ir.errors import ArgumentError, ParseError
from paring.passes.base import Pass
from paring.passes.const_fold import ConstFold
from paring.passes.fuse import Fuse
from paring.passes.layout import Layout
from paring.passes.pipelines import parse_pipeline, show_pipeline
from paring.passes.prepack import Prepack

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Shave(Pass):
    """Has options of all kinds."""

    name = "shave"
    method: str = "mse"
    skip: str = ""
    seed: int | None = None
    share: float = 0.5
    most: float | None = None
    names: tuple[str, ...] = ()
    axis: int = -1

    def check(self) -> None:
        super().check()
        if not 0 <= self.share <= 1:
            raise ArgumentError(f"pass {self.name}: share is {self.share}, it is between 0 and 1")


@dataclass(frozen=True)
class Needy(Pass):
    """Has an option without a default."""

    name = "needy"
    path: str


EXTRA: dict[str, type[Pass]] = {"shave": Shave, "needy": Needy}


def read(text: str) -> tuple[Pass, ...]:
    return parse_pipeline(text, EXTRA)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("shave{method='mse', skip='a, b'}", Shave("mse", "a, b")),
        ('shave{method="mse", skip="a, b"}', Shave("mse", "a, b")),
        ('shave{skip="it\'s"}', Shave(skip="it's")),
        ("shave{skip='say \"so\"'}", Shave(skip='say "so"')),
        (r"shave{skip='it\'s'}", Shave(skip="it's")),
        ("shave{skip='{a}, (b)'}", Shave(skip="{a}, (b)")),
        ("shave{skip='}'}", Shave(skip="}")),
        ("shave{skip='('}", Shave(skip="(")),
        ("shave{seed=3}", Shave(seed=3)),
        ("shave{seed=None, most=2}", Shave(most=2.0)),
        ("shave{share=1}", Shave(share=1.0)),
        ("shave{names=('a', \"b, c\")}", Shave(names=("a", "b, c"))),
        ("shave{axis=-2}", Shave(axis=-2)),
        ("shave{most=inf}", Shave(most=math.inf)),
    ],
)
def test_options_are_read_from_text_with_either_quote(text: str, meant: Pass) -> None:
    (found,) = read(text)
    assert found == meant
    assert repr(found) == repr(meant)
    assert read(f"cse, {text}, dce") == (*read("cse"), meant, *read("dce"))
    assert read(str(found)) == (meant,)


@given(st.text(), st.one_of(st.none(), st.integers()), st.one_of(st.none(), st.floats(allow_nan=False)), st.lists(st.text()))
@example("a, b", None, 1.0, ["'", '"', "}", "{", ",", "\\", "#", "\n"])
def test_any_options_read_back(skip: str, seed: int | None, most: float | None, names: list[str]) -> None:
    given_pass = Shave(skip=skip, seed=seed, most=most, names=tuple(names))
    passes = (Layout(8), given_pass, Layout())
    assert repr(parse_pipeline(show_pipeline(passes), EXTRA)) == repr(passes)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Layout(block=0), ("layout", "block")),
        (lambda: Layout(group=0), ("layout", "group")),
        (lambda: Prepack(block=-16), ("prepack", "block")),
        (lambda: Fuse(max_nodes=-1), ("fuse", "max_nodes")),
        (lambda: Fuse(max_nodes=0), ("fuse", "max_nodes")),
        (lambda: ConstFold(limit=-1), ("const-fold", "limit")),
        (lambda: read("layout{block=0}"), ("layout", "block")),
        (lambda: read("shave{share=2}"), ("shave", "share")),
        (lambda: Layout(block="16"), ("layout", "block")),  # type: ignore[arg-type]
        (lambda: Layout(block=True), ("layout", "block")),
        (lambda: read("shave{seed='x'}"), ("shave", "seed")),
        (lambda: read("shave{seed=1.5}"), ("shave", "seed")),
        (lambda: read("shave{names=('a', 1)}"), ("shave", "names")),
        (lambda: read("shave{method=None}"), ("shave", "method")),
        (lambda: read("needy"), ("needy", "path")),
    ],
)
def test_an_option_out_of_range_names_pass_and_option(make: Callable[[], object], names: tuple[str, str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    for name in names:
        assert name in str(caught.value)


def test_the_least_value_is_allowed() -> None:
    assert (Layout(block=1).block, Fuse(max_nodes=1).max_nodes, ConstFold(limit=0).limit) == (1, 1, 0)


@pytest.mark.parametrize("text", ["shave{skip='a", "shave{skip=a'}", "shave{skip='a\"}", "shave{skip='a' 'b'}"])
def test_bad_quotes_are_refused(text: str) -> None:
    with pytest.raises(ParseError, match="shave"):
        read(text)
