"""What a program is: types, operators, graphs, their text form, and the reference interpreter. Imports numpy only."""

from paring.ir.graph import Graph, Loc, Node, rebuild, substitute, topological
from paring.ir.interpreter import interpret, magnitude_bound
from paring.ir.op import Op
from paring.ir.ops import OPS
from paring.ir.ops.core import Const, Input, Region
from paring.ir.parser import parse
from paring.ir.text import constants, same, show
from paring.ir.types import DTYPES, DType, TensorType

__all__ = [
    "DTYPES",
    "OPS",
    "Const",
    "DType",
    "Graph",
    "Input",
    "Loc",
    "Node",
    "Op",
    "Region",
    "TensorType",
    "constants",
    "interpret",
    "magnitude_bound",
    "parse",
    "rebuild",
    "same",
    "show",
    "substitute",
    "topological",
]
