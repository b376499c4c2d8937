"""What random networks are made of: a builder that keeps sums exact, and one function for each kind of step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np

from paring.ir import Graph, Input, Loc, Node, TensorType
from paring.ir.errors import IRTypeError
from paring.ir.op import Array, Op
from paring.ir.ops import attention, binary, conv, index, linear, norm, pool, reduce, resize, scan, shape, unary
from paring.ir.ops.core import Const

CHANNELS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 20, 32)
# Integers up to 2**24 are exact in float32; two bits are kept in hand for what folding adds up in another order.
EXACT_COUNT = 2.0**22
TAME_COUNT = 2.0**9

Bound = tuple[float, float]
"""Of a tensor: the greatest |value|, and a power of two of which all values are multiples."""


@dataclass
class Builder:
    """Builds one network: `pool` holds the values that later steps may read, `exact` says that sums must be exact."""

    rng: np.random.Generator
    exact: bool = True
    limit: int = 3000
    inputs: list[Node] = field(default_factory=list)
    pool: list[Node] = field(default_factory=list)
    bounds: dict[Node, Bound] = field(default_factory=dict)

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def choose(self, *options: int) -> int:
        return options[int(self.rng.integers(len(options)))]

    def input(self, *dims: int, dtype: str = "float32") -> Node:
        node = Node(Input(f"x{len(self.inputs)}", dtype, dims))
        self.inputs.append(node)
        self.bounds[node] = (8.0, 1.0)
        return node

    def const(self, array: Array) -> Node:
        node = Node(Const(array))
        self.bounds[node] = _bound_of(array)
        return node

    def weights(self, *dims: int) -> Node:
        """A float constant: small integers when exact."""
        if self.exact:
            return self.const(self.rng.choice(np.array([-1, 0, 1, 2], "float32"), dims))
        return self.const((self.rng.standard_normal(dims) / max(1.0, prod(dims[1:])) ** 0.5).astype("float32"))

    def splat(self, value: float, dims: tuple[int, ...]) -> Node:
        return self.node(shape.Broadcast(dims), self.const(np.array(value, "float32")))

    def node(self, op: Op, *operands: Node) -> Node:
        """The op on these operands. Raises IRTypeError, also where sums might not be exact (`tame` the operands)."""
        count = len(self.bounds)
        loc = Loc(f"net.layer{count}", f"net.py:{count}") if self.chance(0.3) else None
        node = Node(op, operands, loc)
        self.bounds[node] = _bound(node, [self.bounds[o] for o in operands])
        greatest, quantum = self.bounds[node]
        if self.exact and greatest / quantum > EXACT_COUNT:
            raise IRTypeError(f"{op.name} is not exact", why=f"up to {greatest} by {quantum}", hint="tame the operands")
        return node

    def tame(self, x: Node) -> Node:
        """The value itself, rounded and clamped where it has grown."""
        greatest, quantum = self.bounds[x]
        if not x.type.is_float or (greatest / quantum <= TAME_COUNT and (self.exact or greatest <= 30)):
            return x
        if self.exact and quantum < 1:
            x = self.node(unary.Round(), x)
        return self.node(unary.Clamp(-8.0, 8.0), x)

    def pick(self, where: Callable[[TensorType], bool]) -> Node | None:
        """A float value of the pool, tamed, recent ones more often."""
        found = [n for n in self.pool if n.type.is_float and where(n.type)]
        if not found:
            return None
        return self.tame(found[-1] if self.chance(0.5) else found[int(self.rng.integers(len(found)))])

    def image(self) -> Node:
        """Any (N, C, H, W) that is not empty, of the pool or new."""
        found = self.pick(lambda t: t.rank == 4 and t.size > 0)
        if found is None or self.chance(0.05):
            height, width = (int(v) for v in self.rng.integers(1, 9, 2))
            found = self.input(self.choose(1, 1, 2), self.choose(*CHANNELS), height, width)
        return found

    def tensor(self, *ranks: int) -> Node:
        """Any float tensor of one of these ranks that is not empty, of the pool or new."""
        found = self.pick(lambda t: t.rank in ranks and t.size > 0)
        return found or self.input(*(int(v) for v in self.rng.integers(1, 8, self.choose(*ranks))))

    def like(self, x: Node) -> Node:
        """Another value of the same type: of the pool, a constant, or a new input."""
        found = self.pick(lambda t: t == x.type) if self.chance(0.6) else None
        if found is None and self.chance(0.5):
            found = self.vector_for(x)
        return found or self.input(*x.type.shape)

    def vector_for(self, x: Node) -> Node:
        """A constant broadcast to the shape of x: a scalar, or one value for each channel."""
        dims = x.type.shape
        if len(dims) >= 2 and self.chance(0.6):
            axis = 1 if len(dims) == 4 else len(dims) - 1
            return self.node(shape.Broadcast(dims), self.weights(dims[axis], *(1,) * (len(dims) - 1 - axis)))
        return self.node(shape.Broadcast(dims), self.weights())

    def layer(
        self, x: Node, out: int, kernel: int = 3, *, groups: int = 1, bias: bool = True, stride: int = 1, dilation: int = 1
    ) -> Node:
        """A convolution with constant weights that fits any image."""
        total = dilation * (kernel - 1)
        pads = ((total // 2, total - total // 2), (total - total // 2, total // 2))
        op = conv.Conv2d((stride, stride), pads, (dilation, dilation), groups)
        parameters = [self.weights(out, x.type.shape[1] // groups, kernel, kernel), *([self.weights(out)] if bias else [])]
        return self.node(op, self.tame(x), *parameters)

    def batch_norm(self, x: Node) -> Node:
        c = x.type.shape[1]
        if self.exact:
            eps, deviation = (0.25, self.rng.choice([1.0, 2.0], c)) if self.chance(0.5) else (1.0, np.full(c, 2.0))
            var = self.const((deviation**2 - eps).astype("float32"))
        else:
            eps, var = 1e-3, self.const(self.rng.uniform(0.01, 1.5, c).astype("float32"))
        return self.node(norm.BatchNorm(eps), x, self.weights(c), self.weights(c), self.weights(c), var)

    def finish(self, wanted: Node | None = None) -> Graph:
        """The graph: a few of the values are outputs, one of them perhaps twice; perhaps one input is not read."""
        if not self.pool:
            self.pool.append(self.node(unary.Relu(), self.image()))
        count = min(len(self.pool), int(self.rng.integers(1, 4)))
        outputs = [self.pool[-1], *(self.pool[int(i)] for i in self.rng.integers(0, len(self.pool), count - 1))]
        if wanted is not None:
            outputs.append(wanted)
        if self.chance(0.2):
            outputs.append(outputs[0])
        if self.chance(0.2):
            self.input(2, 3)
        return Graph(tuple(self.inputs), tuple(outputs))


def _bound_of(array: Array) -> Bound:
    if array.size == 0 or array.dtype == bool:
        return 1.0, 1.0
    wide = array.astype(np.float64)
    quantum = next((2.0**-k for k in range(12) if np.equal(np.mod(wide * 2.0**k, 1), 0).all()), 2.0**-12)
    return float(np.abs(wide).max()), quantum


def _bound(node: Node, of: list[Bound]) -> Bound:
    """What holds of a node's values (and of every partial sum), given what holds of its operands'."""
    greatest, quantum = max((g for g, _ in of), default=1.0), min((q for _, q in of), default=1.0)
    match node.op:
        case conv.Conv2d() | conv.ConvTranspose2d() | linear.Linear() | linear.Matmul():
            macs = node.macs
            terms = max(1.0, macs / max(1, min(node.type.size, node.inputs[0].type.size)))
            return of[0][0] * of[1][0] * terms + sum(g for g, _ in of[2:]), min(of[0][1] * of[1][1], quantum)
        case norm.BatchNorm():
            return (of[0][0] + of[3][0]) * of[1][0] + of[2][0], quantum * of[1][1] / 2
        case binary.Add() | binary.Sub():
            return of[0][0] + of[1][0], quantum
        case binary.Mul():
            return of[0][0] * of[1][0], of[0][1] * of[1][1]
        case binary.Div():
            return greatest, of[0][1] / max(1.0, of[1][0])
        case reduce.Sum() | scan.CumSum():
            return greatest * max(1, node.inputs[0].type.size), quantum
        case reduce.Mean() | pool.AdaptiveAvgPool2d():
            return greatest, quantum * max(1, node.type.size) / max(1, node.inputs[0].type.size)
        case pool.AvgPool2d(kernel=(kh, kw)):
            return greatest, quantum / (kh * kw)
        case unary.LeakyRelu(alpha=alpha):
            return greatest, quantum * alpha
        case unary.Clamp(low=low, high=high):
            sides = [abs(side) for side in (low, high) if np.isfinite(side)]
            return (min(greatest, max(sides)) if len(sides) == 2 else max(greatest, *sides)), min(quantum, 0.5)
        case unary.Round() | unary.Floor() | unary.Ceil():
            return greatest + 1, 1.0
        case shape.Pad(value=value):
            return max(greatest, abs(value)), quantum
        case binary.Where():
            return max(of[1][0], of[2][0]), min(of[1][1], of[2][1])
        case index.Gather() | index.GatherElements():
            return of[0]
        case unary.Sigmoid() | unary.Tanh() | norm.Softmax():
            return 1.0, quantum
        case reduce.ArgMax():
            return float(node.inputs[0].type.size), 1.0
    return greatest, quantum


def _power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


def convolution(b: Builder) -> Node:
    x, kernel = b.image(), b.choose(1, 1, 2, 3, 3)
    channels = x.type.shape[1]
    kind = b.choose(0, 1, 2, 3, 4)
    if kind == 0:
        return b.layer(x, channels, kernel, groups=channels, bias=b.chance(0.5), stride=b.choose(1, 2))
    if kind == 1 and channels % 2 == 0:
        return b.layer(x, b.choose(2, 8, 32), kernel, groups=2, bias=b.chance(0.5))
    dilation = 2 if kind == 2 else 1
    return b.layer(x, b.choose(*CHANNELS), kernel, bias=b.chance(0.5), stride=b.choose(1, 1, 2), dilation=dilation)


def transposed_convolution(b: Builder) -> Node:
    x, out = b.image(), b.choose(1, 2, 4)
    groups = b.choose(1, 2) if x.type.shape[1] % 2 == 0 else 1
    stride, extra = b.choose(1, 2), b.choose(0, 1)
    op = conv.ConvTranspose2d((stride, 1), (extra, 0), (stride - 1, 0), groups=groups)
    return b.node(op, x, b.weights(x.type.shape[1], out, 3, 2), *([b.weights(out * groups)] if b.chance(0.5) else []))


def normalised(b: Builder) -> Node:
    return b.batch_norm(convolution(b) if b.chance(0.6) else b.tensor(2, 3, 4))


def residual(b: Builder) -> Node:
    x = b.image()
    y = b.node(unary.Relu(), b.batch_norm(b.layer(x, x.type.shape[1], bias=False)))
    y = b.batch_norm(b.layer(y, x.type.shape[1]))
    return b.node(unary.Relu(), b.node(binary.Add(), *((y, x) if b.chance(0.5) else (x, y))))


def squeeze_excite(b: Builder) -> Node:
    x = b.image()
    whole = pool.AdaptiveAvgPool2d((1, 1)) if not b.exact or _power_of_two(prod(x.type.shape[2:])) else reduce.Max((2, 3), True)
    gate = b.node(unary.Relu(), b.layer(b.node(whole, x), 4, 1))
    gate = b.layer(gate, x.type.shape[1], 1)
    gate = b.node(unary.Clamp(0.0, 2.0) if b.exact else unary.Sigmoid(), gate)
    return b.node(binary.Mul(), x, b.node(shape.Broadcast(x.type.shape), gate))


def pooling(b: Builder) -> Node:
    x, stride = b.image(), b.choose(1, 2)
    kind = b.choose(0, 1, 2, 3)
    if kind == 0:
        return b.node(pool.MaxPool2d((3, 3), (stride, 2), (1, 1), ceil_mode=b.chance(0.3)), x)
    if kind == 1:
        return b.node(pool.AvgPool2d((2, 2), (stride, stride), (b.choose(0, 1), 0)), x)
    if kind == 2 and not (b.exact and not _power_of_two(prod(x.type.shape[2:]))):
        return b.node(pool.AdaptiveAvgPool2d((1, 1)), x)
    height, width = x.type.shape[2:]
    if b.exact and not _power_of_two(height * width):
        return b.node(pool.MaxPool2d((2, 1), (1, 1), dilation=(1, 1)), x)
    return b.node(pool.AdaptiveAvgPool2d((height // 2 or 1, 1) if height % 2 == 0 else (1, width)), x)


_EXACT_UNARY: tuple[Op, ...] = (
    *(unary.Relu(), unary.Clamp(0.0, 6.0), unary.Clamp(-2.0, 2.0), unary.Clamp(low=0.0), unary.LeakyRelu(0.5)),
    *(unary.Abs(), unary.Neg(), unary.Floor(), unary.Ceil(), unary.Round(), unary.Sign()),
)
_FLOAT_UNARY: tuple[Op, ...] = (
    *(unary.Relu(), unary.Clamp(0.0, 6.0), unary.LeakyRelu(), unary.Abs(), unary.Neg(), unary.Sigmoid(), unary.Tanh()),
    *(unary.Silu(), unary.Gelu(), unary.Gelu(True), unary.Elu(), unary.HardSwish(), unary.HardSigmoid(), unary.Erf()),
    *(unary.Sin(), unary.Cos()),
)


def elementwise(b: Builder) -> Node:
    options = _EXACT_UNARY if b.exact else _FLOAT_UNARY
    return b.node(options[int(b.rng.integers(len(options)))], b.tensor(1, 2, 3, 4))


def chain(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    for _ in range(int(b.rng.integers(5, 15))):
        op = (unary.Relu(), unary.Neg(), unary.Abs(), unary.Clamp(-4.0, 4.0))[b.choose(0, 1, 2, 3)]
        x = b.node(op, x)
    return x


def arithmetic(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    y = b.like(x)
    kind = b.choose(0, 0, 1, 2, 3, 4, 5)
    if kind == 5:
        return b.node(binary.Div(), x, b.splat(b.choose(1, 2, 4), x.type.shape))
    return b.node((binary.Add(), binary.Sub(), binary.Mul(), binary.Maximum(), binary.Minimum())[kind], x, y)


def neutral(b: Builder) -> Node:
    """Something that does nothing, in one of its many forms."""
    x = b.tensor(2, 3, 4)
    kind, dims = b.choose(0, 1, 2, 3, 4, 5), x.type.shape
    if kind == 0:
        return b.node(shape.Reshape(dims), x)
    if kind == 1:
        return b.node(binary.Mul(), b.splat(1, dims), x)
    if kind == 2:
        return b.node(binary.Sub(), x, b.splat(0.0, dims))
    if kind == 3:
        return b.node(unary.Neg(), b.node(unary.Neg(), x))
    if kind == 4:
        return b.node(shape.Pad(((0, 0),) * len(dims)), x)
    return b.node(unary.Cast("float32"), x)


def concatenation(b: Builder) -> Node:
    x = b.image()
    n, _, h, w = x.type.shape
    y = b.pick(lambda t: t.rank == 4 and t.size > 0 and (t.shape[0], *t.shape[2:]) == (n, h, w)) or b.layer(x, b.choose(3, 4, 16))
    parts = [x, y, x] if b.chance(0.2) else [x, y]
    return b.node(shape.Concat(1 if b.chance(0.8) else 2), *parts)


def slicing(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    starts, stops, steps = [], [], []
    for size in x.type.shape:
        whole = b.chance(0.5)
        start = 0 if whole else int(b.rng.integers(0, size))
        starts.append(start)
        least = start if b.chance(0.03) else start + 1
        stops.append(size if whole else int(b.rng.integers(least, size + 1)))
        steps.append(1 if whole else b.choose(1, 1, 2))
    return b.node(shape.Slice(tuple(starts), tuple(stops), tuple(steps)), x)


def splitting(b: Builder) -> Node:
    """Channels cut apart and put together again in another order."""
    x = b.image()
    n, c, h, w = x.type.shape
    cut = int(b.rng.integers(0, c + 1))
    left = b.node(shape.Slice((0, 0, 0, 0), (n, cut, h, w), (1,) * 4), x)
    right = b.node(shape.Slice((0, cut, 0, 0), (n, c, h, w), (1,) * 4), x)
    return b.node(shape.Concat(1), right, left)


def padding(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    mode = ("constant", "reflect", "replicate")[b.choose(0, 0, 1, 2)]
    pads = tuple((b.choose(0, 1), b.choose(0, 0, 2)) if d >= x.type.rank - 2 else (0, 0) for d in range(x.type.rank))
    return b.node(shape.Pad(pads, mode, float(b.choose(0, 0, 1, -2)) if mode == "constant" else 0.0), x)


def moving(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    rank, dims = x.type.rank, x.type.shape
    kind = b.choose(0, 0, 1, 2, 3, 4)
    if kind == 0:
        return b.node(shape.Transpose(tuple(int(d) for d in b.rng.permutation(rank))), x)
    if kind == 1:
        return b.node(shape.Reshape((dims[0], prod(dims[1:])) if b.chance(0.5) else (*dims[::-1],)), x)
    if kind == 2:
        return b.node(shape.Flip((b.choose(*range(rank)),)), x)
    if kind == 3:
        return b.node(shape.Roll((b.choose(-1, 0, 1, 3),), (b.choose(*range(rank)),)), x)
    return b.node(index.Tril(b.choose(-1, 0, 1)) if b.chance(0.5) else index.Triu(), x)


def spreading(b: Builder) -> Node:
    """Something small, computed, made as large as an image."""
    x = b.image()
    n, c, h, w = x.type.shape
    small = b.node(reduce.Max((2, 3), True), x) if b.chance(0.5) else b.input(*((n, 1, 1, 1) if b.chance(0.5) else (c, 1, 1)))
    return b.node(binary.Add(), b.node(shape.Broadcast((n, c, h, w)), small), x)


def constant_work(b: Builder) -> Node:
    """An expression of constants alone, added to something."""
    x = b.image()
    c = x.type.shape[1]
    value = b.node(binary.Sub(), b.node(unary.Abs(), b.weights(c, 1)), b.weights(c, 1))
    value = b.node(shape.Reshape((c, 1, 1)), b.node(shape.Transpose((1, 0)), value))
    return b.node(binary.Add(), x, b.node(shape.Broadcast(x.type.shape), value))


def fully_connected(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    if x.type.rank == 4:
        x = b.node(shape.Reshape((x.type.shape[0], prod(x.type.shape[1:]))), x)
    width = x.type.shape[-1]
    out = b.choose(1, 3, 8, 10)
    if b.chance(0.5) or x.type.rank < 2 or width > 64:
        return b.node(linear.Linear(), x, b.weights(out, width), *([b.weights(out)] if b.chance(0.5) else []))
    return b.node(linear.Matmul(), x, b.node(shape.Broadcast((*x.type.shape[:-2], width, out)), b.weights(width, out)))


def product(b: Builder) -> Node:
    x = b.tensor(2, 3)
    order = (*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2)
    return b.node(linear.Matmul(), x, b.node(shape.Transpose(order), b.like(x)))


def reduction(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    axes, keep = (b.choose(*range(x.type.rank)),), b.chance(0.5)
    kind = b.choose(0, 1, 2, 3)
    if kind == 3 and (not b.exact or _power_of_two(x.type.shape[axes[0]])):
        return b.node(reduce.Mean(axes, keep), x)
    if kind == 2 and b.exact:
        return b.node(reduce.ArgMax(axes[0], keep), x)
    return b.node((reduce.Max, reduce.Min, reduce.Sum)[kind % 3](axes, keep), x)


def choosing(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    condition = b.node((binary.Less(), binary.GreaterEqual(), binary.Equal())[b.choose(0, 1, 2)], x, b.like(x))
    return b.node(binary.Where(), b.node(unary.LogicalNot(), condition), x, b.like(x))


def looking_up(b: Builder) -> Node:
    x = b.tensor(2, 3, 4)
    if b.chance(0.5):
        return b.node(index.Gather(0), x, b.input(3, dtype="int64"))
    axis = b.choose(*range(x.type.rank))
    where = b.rng.integers(0, x.type.shape[axis], b.choose(1, 2, 4))
    return b.node(index.Gather(axis), x, b.const(where))


def resampling(b: Builder) -> Node:
    x = b.image()
    if x.type.shape[1] % 4 == 0 and b.chance(0.5):
        return b.node(shape.PixelShuffle(2), x)
    size = (int(b.rng.integers(1, 7)), int(b.rng.integers(1, 7)))
    return b.node(resize.Resize(size) if b.exact or b.chance(0.5) else resize.Resize(size, "bilinear", b.chance(0.5)), x)


def running_sum(b: Builder) -> Node:
    x = b.tensor(1, 2)
    return b.node(scan.CumSum(x.type.rank - 1), x)


def gated(b: Builder) -> Node:
    x = b.tensor(2, 3, 4)
    return b.node(binary.Mul(), x, b.node(unary.Sigmoid(), x))


def softened(b: Builder) -> Node:
    x = b.tensor(2, 3, 4)
    kind, width = b.choose(0, 1, 2, 3, 4), x.type.shape[-1]
    if kind == 0:
        return b.node(norm.Softmax(x.type.rank - 1), x)
    if kind == 1:
        return b.node(norm.LogSoftmax(1), x)
    if kind == 2:
        return b.node(norm.LayerNorm(0.1), x, b.weights(width), b.weights(width))
    if kind == 3:
        return b.node(norm.RmsNorm(0.1), x, b.weights(width))
    return b.node(norm.GroupNorm(1, 0.1), x, b.weights(x.type.shape[1]), b.weights(x.type.shape[1]))


def attending(b: Builder) -> Node:
    q = b.image()
    mask = [b.input(*q.type.shape[:3], q.type.shape[2])] if b.chance(0.3) else []
    return b.node(attention.ScaledDotProductAttention(causal=b.chance(0.3)), q, b.like(q), b.like(q), *mask)


STEPS: tuple[tuple[Callable[[Builder], Node], float, bool], ...] = (
    *((step, 2.0, True) for step in (convolution, normalised, residual, elementwise, arithmetic, concatenation)),
    *((step, 1.0, True) for step in (squeeze_excite, pooling, neutral, slicing, splitting, padding, moving, spreading)),
    *((step, 0.6, True) for step in (constant_work, fully_connected, product, reduction, choosing, looking_up, resampling)),
    *((step, 0.3, True) for step in (chain, transposed_convolution, running_sum)),
    *((step, 1.0, False) for step in (gated, softened, attending)),
)
"""Each step, how often it is taken, and whether it may be taken in exact graphs."""
