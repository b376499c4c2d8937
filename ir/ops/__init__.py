"""The one table of operators: text name -> class."""

from __future__ import annotations

from paring.ir.op import Op
from paring.ir.ops import (
    attention,
    binary,
    conv,
    core,
    index,
    linear,
    norm,
    pack,
    pool,
    quantized,
    reduce,
    resize,
    scan,
    shape,
    sparse,
    unary,
    winograd,
)

ALL: tuple[type[Op], ...] = (
    *(core.Input, core.Const, core.Region),
    *(conv.Conv2d, conv.ConvTranspose2d, linear.Linear, linear.Matmul),
    *(sparse.SparseConv2d, sparse.SparseLinear, winograd.WinogradConv2d),
    *(unary.Relu, unary.Clamp, unary.LeakyRelu, unary.Elu, unary.Silu, unary.Gelu, unary.HardSwish, unary.HardSigmoid),
    *(unary.Sigmoid, unary.Tanh, unary.Exp, unary.Log, unary.Sqrt, unary.Rsqrt, unary.Erf, unary.Sin, unary.Cos, unary.Abs),
    *(unary.Neg, unary.Floor, unary.Ceil, unary.Round, unary.Sign, unary.LogicalNot, unary.Cast),
    *(binary.Add, binary.Sub, binary.Mul, binary.Div, binary.FloorDiv, binary.Remainder, binary.Pow),
    *(binary.Maximum, binary.Minimum, binary.Equal, binary.NotEqual, binary.Less, binary.LessEqual, binary.Greater),
    *(binary.GreaterEqual, binary.LogicalAnd, binary.LogicalOr, binary.Where),
    *(shape.Broadcast, shape.Reshape, shape.Transpose, shape.Concat, shape.Slice, shape.Flip, shape.Roll, shape.Pad),
    *(shape.PixelShuffle, shape.LayoutTransform, pack.PackConvWeight, pack.PackLinearWeight),
    *(norm.BatchNorm, norm.LayerNorm, norm.RmsNorm, norm.GroupNorm, norm.Softmax, norm.LogSoftmax),
    *(pool.MaxPool2d, pool.AvgPool2d, pool.AdaptiveAvgPool2d),
    *(reduce.Sum, reduce.Mean, reduce.Max, reduce.Min, reduce.ArgMax),
    *(index.Gather, index.GatherElements, index.Tril, index.Triu),
    *(resize.Resize, scan.CumSum, attention.ScaledDotProductAttention, attention.IntegerAttention),
    *(quantized.Quantize, quantized.Dequantize, quantized.DequantizeChannels, quantized.Descale, quantized.Requantize),
    *(quantized.QuantizedMul, quantized.Lookup),
)

# One result element from one element of each operand, all of one shape.
ELEMENTWISE: tuple[type[Op], ...] = (
    *(unary.Unary, unary.Cast, binary.Binary, binary.Where),
    *(quantized.Quantize, quantized.Dequantize, quantized.Descale, quantized.Requantize, quantized.QuantizedMul),
)

# The same, where an operand may be read as a whole besides: the table of a lookup.
POINTWISE: tuple[type[Op], ...] = (*ELEMENTWISE, quantized.Lookup)

OPS: dict[str, type[Op]] = {op.name: op for op in ALL}
