"""The table of operators: complete, imported or internal, of one text for equal operators."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import paring.ir.ops
from paring.ir import OPS, Graph, Input, Node, Op, TensorType, same, show
from paring.ir.errors import IRTypeError
from paring.ir.ops import ALL, attention, conv, shape, unary
from paring.passes.ledger import measure

pytestmark = pytest.mark.fast

FRONTENDS = Path(__file__).parent.parent / "frontends"

# What no model has: structure of the IR, and what passes make.
INTERNAL = {
    *("input", "const", "region"),
    *("layout_transform", "pack_conv_weight", "pack_linear_weight"),
    *("descale", "requantize", "quantized_mul", "lookup", "integer_attention"),
    *("sparse_conv2d", "sparse_linear", "winograd_conv2d"),
}


def floats(*dims: int) -> TensorType:
    return TensorType("float32", dims)


def graph_of(op: Op, *types: TensorType) -> Graph:
    inputs = tuple(Node(Input(f"x{i}", t.dtype, t.shape)) for i, t in enumerate(types))
    return Graph(inputs, (Node(op, inputs),))


def test_every_operator_class_is_in_the_table() -> None:
    modules = [importlib.import_module(f"paring.ir.ops.{m.name}") for m in pkgutil.iter_modules(paring.ir.ops.__path__)]
    public = [v for m in modules for k, v in vars(m).items() if isinstance(v, type) and not k.startswith("_")]
    named = {cls for cls in public if issubclass(cls, Op) and hasattr(cls, "name")}
    assert {cls.__name__ for cls in named} == {cls.__name__ for cls in ALL}
    assert len(OPS) == len(ALL), "two operators of one name"


def test_every_operator_is_imported_or_internal() -> None:
    """By name: an importer that makes nodes of an operator names its class."""
    names: set[str] = set()
    # What makes torch modules of graphs names operators too.
    for path in sorted(set(FRONTENDS.glob("*.py")) - {FRONTENDS / "torch_module.py", FRONTENDS / "torch_ops.py"}):
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
    imported = {name for name, cls in OPS.items() if cls.__name__ in names}
    assert set(OPS) - imported - INTERNAL == set(), "no row of the importer makes these"
    assert imported & INTERNAL <= {"input", "const"}, "these are not internal"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (unary.Clamp(low=1, high=2), unary.Clamp(low=1.0, high=2.0)),
        (unary.LeakyRelu(1), unary.LeakyRelu(1.0)),
        (shape.Pad(((0, 1), (0, 0)), value=-3), shape.Pad(((0, 1), (0, 0)), value=-3.0)),
    ],
)
def test_an_int_given_for_a_float_is_that_float(given: Op, meant: Op) -> None:
    assert given == meant
    assert repr(given) == repr(meant)
    assert same(graph_of(given, floats(2, 3)), graph_of(meant, floats(2, 3)))
    assert show(graph_of(given, floats(2, 3))) == show(graph_of(meant, floats(2, 3)))


def test_an_int_given_for_an_optional_float_is_that_float() -> None:
    assert repr(attention.ScaledDotProductAttention(scale=2)) == repr(attention.ScaledDotProductAttention(scale=2.0))
    assert attention.ScaledDotProductAttention().scale is None


@pytest.mark.parametrize("low", [2**53 + 1, -(10**400), True])
def test_what_is_no_float_is_refused_as_one(low: int) -> None:
    with pytest.raises(IRTypeError, match="attribute low"):
        graph_of(unary.Clamp(low=low), floats(2))


@pytest.mark.parametrize(
    ("op", "weight", "reason"),
    [
        (conv.Conv2d(), (0, 3, 3, 3), "the weight is empty"),
        (conv.Conv2d(), (4, 3, 0, 3), "the weight is empty"),
        (conv.Conv2d(), (4, 3, 3, 0), "the weight is empty"),
        (conv.ConvTranspose2d(), (3, 0, 3, 3), "the weight is empty"),
        (conv.ConvTranspose2d(output_padding=(1, 1)), (3, 4, 0, 0), "the weight is empty"),
    ],
)
def test_convolutions_that_cannot_be_are_refused(op: Op, weight: tuple[int, ...], reason: str) -> None:
    with pytest.raises(IRTypeError) as caught:
        graph_of(op, floats(1, 3, 6, 6), floats(*weight))
    assert reason in str(caught.value)


def test_a_convolution_of_no_images_costs_nothing() -> None:
    assert measure(graph_of(conv.Conv2d(), floats(0, 3, 6, 6), floats(4, 3, 3, 3))).macs == 0
