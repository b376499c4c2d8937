"""What the weights of layers are multiplied with, over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import conv
from paring.passes.compress.calibrate import gather
from paring.passes.rewriter import Context

# Rows of operands that one batch adds to a layer's statistics.
ROWS = 2048


def see_operands(graph: Graph, layers: Sequence[Node], context: Context, see: Callable[[Node, Array], None]) -> None:
    """Show each layer its `operand_rows` for each batch: one run of the graph for each batch."""
    readers: dict[Node, list[Node]] = {}
    for layer in layers:
        readers.setdefault(layer.inputs[0], []).append(layer)

    def of_readers(node: Node, values: Array) -> None:
        for layer in readers[node]:
            see(layer, operand_rows(layer, values))

    gather(graph, list(readers), context, of_readers)


def operand_rows(layer: Node, x: Array) -> Array:
    """(groups, rows, columns): each row is what the weights of one output element are multiplied with; at most `ROWS`.

    Columns are in the order of the weights of one output: input channels of the group, then taps.
    """
    if not isinstance(layer.op, conv.Conv2d):
        return x.reshape(1, -1, x.shape[-1])[:, :ROWS]
    op, (kh, kw) = layer.op, layer.inputs[1].type.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), *op.padding))
    span = ((kh - 1) * op.dilation[0] + 1, (kw - 1) * op.dilation[1] + 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, span, (2, 3))
    windows = windows[:, :, :: op.stride[0], :: op.stride[1], :: op.dilation[0], :: op.dilation[1]]
    n, _, oh, ow = windows.shape[:4]
    places = np.arange(0, n * oh * ow, max(1, -(-n * oh * ow // ROWS)))
    images, rows, columns = np.unravel_index(places, (n, oh, ow))
    # Only these are copied: all windows would be KH * KW times the image.
    chosen = windows[images, :, rows, columns].reshape(len(places), op.groups, -1)
    return np.ascontiguousarray(chosen.transpose(1, 0, 2))
