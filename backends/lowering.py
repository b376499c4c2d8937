"""The lowering table: what an element, or a vector of elements, of each op's result is.

A lowering takes the kernel, the node and an index, emits what loops it needs at the current place, and gives an expression.
It takes lanes in any component of the index; where they are not lanes of its operands too, it goes lane by lane.
"""

from __future__ import annotations

from paring.backends.kernel import Index, Kernel, Lowering, Value
from paring.backends.lowerings.image import IMAGES
from paring.backends.lowerings.loops import by_lane, scalar_only
from paring.backends.lowerings.movement import MOVEMENT
from paring.backends.lowerings.product import PRODUCTS
from paring.backends.lowerings.reduce import REDUCTIONS
from paring.backends.lowerings.sparse import SPARSE
from paring.backends.lowerings.winograd import WINOGRAD
from paring.backends.scalar import SCALARS, takes_vectors
from paring.backends.vecmath import cast, dtype_of
from paring.ir.graph import Node


@by_lane
def elementwise(kernel: Kernel, node: Node, index: Index) -> Value:
    """Half precision is computed in float32 and rounded once."""
    source = node.inputs[0].type.dtype
    if not takes_vectors(node.op, source):
        scalar_only(index)
    values = [kernel.value(operand, index) for operand in node.inputs]
    wide = [cast(v, "float32") if dtype_of(v) == "float16" else v for v in values]
    return cast(SCALARS[type(node.op)](node.op, *wide), node.type.dtype)


LOWERINGS: dict[type, Lowering] = {
    **dict.fromkeys(SCALARS, elementwise),
    **MOVEMENT,
    **REDUCTIONS,
    **PRODUCTS,
    **SPARSE,
    **WINOGRAD,
    **IMAGES,
}
