"""The one table from aten operators to the IR: overload name -> converter(builder, *arguments in schema order).

Optional arguments arrive with their defaults. A converter returns what the operator returns: a node, or a tuple of nodes.
To support an operator add a row to the table of its family; torch's own decompositions stand in for operators without one.
"""

from __future__ import annotations

from paring.frontends import aten_elementwise, aten_nn, aten_pool, aten_quantized, aten_reduce, aten_shape
from paring.frontends.aten_builder import Table

TABLE: Table = {
    **aten_elementwise.TABLE,
    **aten_shape.TABLE,
    **aten_reduce.TABLE,
    **aten_nn.TABLE,
    **aten_pool.TABLE,
    **aten_quantized.TABLE,
}
