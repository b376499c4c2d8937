"""Each family of operators, imported, interpreted, and held against torch in float64-ratio mode."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

from paring.frontends.aten import TABLE
from paring.frontends.oracle import TORCH_FACTOR, ratios, reference
from paring.frontends.torch_export import import_model
from paring.ir import interpret, show

Function = Callable[..., Any]


class Wrapped(nn.Module):
    """All functions of a table on the same arguments: one export for many operators."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, *args: torch.Tensor) -> Any:
        return {name: function(*args) for name, function in self.functions.items()}


def check(model: nn.Module | Function, *args: Any) -> set[str]:
    """Import, interpret, compare; returns the names of the IR operators used."""
    module = model if isinstance(model, nn.Module) else Wrapped({"": model})
    module.eval()
    imported = import_model(module, args)
    inputs = imported.flatten_inputs(args)
    got = interpret(imported.graph, inputs)
    leaves, _ = pytree.tree_flatten_with_path(imported.unflatten_outputs(got, True))
    paths = [pytree.keystr(path) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    found = zip(paths, ratios(imported, inputs, got, reference(module, args)), strict=True)
    bad = {path: ratio for path, ratio in found if not ratio <= TORCH_FACTOR}
    assert not bad, f"error over that of torch: {bad}\n{show(imported.graph)}"
    return {node.op.name for node in imported.graph.nodes()}


def check_all(functions: Mapping[str, Function], *args: Any) -> set[str]:
    """`check` for each function of a table, under one export."""
    return check(Wrapped(functions), *args)


def f(*shape: int, low: float = -3.0, high: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + 31 * len(shape))
    return torch.rand(shape, generator=generator) * (high - low) + low


def i(*shape: int, low: int = -5, high: int = 6, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + 17)
    return torch.randint(low, high, shape, generator=generator, dtype=dtype)


def flags(*shape: int) -> torch.Tensor:
    return i(*shape, low=0, high=2) == 1


SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.5, -1.5, 2.5, 100.0, -100.0, 1e-10, -1e-6])

UNARY: dict[str, Function] = {
    **{name: getattr(F, name) for name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "selu", "gelu", "elu", "celu")},
    **{name: getattr(F, name) for name in ("softplus", "mish", "logsigmoid", "hardtanh", "leaky_relu", "softsign", "tanhshrink")},
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "exp", "erf", "sin", "cos", "abs", "neg", "floor", "ceil")},
    **{name: getattr(torch, name) for name in ("round", "sign", "trunc", "frac", "expm1", "exp2", "erfc", "isnan", "isinf")},
    **{name: getattr(torch, name) for name in ("square", "logical_not", "isfinite", "reciprocal", "nan_to_num", "cosh", "sinh")},
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 7.0),
    "clamp": lambda x: x.clamp(-1, 2.5),
    "clamp_min": lambda x: x.clamp(min=0.25),
    "relu_in_place": lambda x: F.relu_(x * 1.0),
    "pow_2": lambda x: x**2,
    "pow_3": lambda x: x**3,
    "pow_-1": lambda x: x**-1,
    "round_2": lambda x: torch.round(x, decimals=2),
}
POSITIVE: dict[str, Function] = {
    **{name: getattr(torch, name) for name in ("log", "sqrt", "rsqrt", "log1p", "log2", "log10")},
    "pow_half": lambda x: x**0.5,
    "prod": lambda x: (x.prod(), x.prod(-1)),
    "pow_1.7": lambda x: x**1.7,
    "2_pow": lambda x: 2**x,
}


@pytest.mark.parametrize("x", [f(2, 3, 5), SPECIAL[3:]], ids=["random", "corners"])
def test_unary(x: torch.Tensor) -> None:
    check_all(UNARY, x)


def test_unary_on_nan_and_infinities() -> None:
    # torch's own gelu gives NaN for infinities in its vector code and not in its scalar code.
    check_all({name: function for name, function in UNARY.items() if "gelu" not in name}, SPECIAL)


@pytest.mark.parametrize("x", [f(2, 3, low=0.01, high=9.0), f(7, low=1e-7, high=1e-5)], ids=["random", "small"])
def test_positive(x: torch.Tensor) -> None:
    check_all(POSITIVE, x)


BINARY: dict[str, Function] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "maximum", "minimum", "remainder", "fmod", "fmax")},
    **{name: getattr(torch, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "floor_divide", "logical_and", "logical_xor")},
    "add_alpha": lambda x, y: torch.add(x, y, alpha=2),
    "sub_alpha": lambda x, y: torch.sub(x, y, alpha=-2),
    "rsub": lambda x, y: torch.rsub(x, y, alpha=2),
    "div_trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "div_floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
}


OPERANDS = {
    "broadcast": (f(2, 1, 5), f(3, 1, low=0.5)),
    "integers": (i(4, 3), i(3, low=1, high=5)),
    "0-d": (f(3), torch.tensor(2.5)),
}


@pytest.mark.parametrize("kind", OPERANDS)
def test_binary(kind: str) -> None:
    check_all(BINARY, *OPERANDS[kind])


PROMOTION: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "int + float scalar": (lambda x: x + 1.5, (i(3),)),
    "int32 + int64": (lambda x, y: x + y, (i(3, dtype=torch.int32), i(3))),
    "int64 0-d + int32": (lambda x, y: x + y, (i(3, dtype=torch.int32), torch.tensor(7))),
    "float64 0-d * float32": (lambda x, y: x * y, (f(3), torch.tensor(2.0, dtype=torch.float64))),
    "bool + int": (lambda x, y: x + y, (flags(4), i(4))),
    "bool * bool": (lambda x, y: (x * y, x + y, x & y, x | ~y, x ^ y), (flags(4), ~flags(4))),
    "bool < bool": (lambda x, y: x < y, (flags(4), ~flags(4))),
    "int / int": (lambda x: x / 2, (i(4),)),
    "int sigmoid": (torch.sigmoid, (i(4),)),
    "1 - x": (lambda x: 1 - x, (f(4),)),
    "2 / x": (lambda x: 2 / x, (f(4, low=1.0),)),
    "uint8": (lambda x: x * 2 + 1, (i(4, low=0, high=250, dtype=torch.uint8),)),
    "casts": (lambda x: (x.long(), x.bool(), x.double(), x.to(torch.int32).float()), (f(6),)),
    "int power": (lambda x: x**5, (i(6),)),
    "int clamp": (lambda x: (x.clamp(-2, 3), x.clamp(0.5, 2.5), x.clamp(max=2**62)), (i(6),)),
    "bitwise not": (lambda x: ~x, (i(6),)),
    "float64": (lambda x: torch.softmax(x * 2, -1), (f(3, 4).double(),)),
}


def test_promotion() -> None:
    arguments = tuple(args for _, args in PROMOTION.values())
    rows = list(PROMOTION.items())
    functions = {name: partial(_row, function, position) for position, (name, (function, _)) in enumerate(rows)}
    check_all(functions, *arguments)


def _row(function: Function, position: int, *arguments: tuple[torch.Tensor, ...]) -> Any:
    """The function on the arguments of its own row."""
    return function(*arguments[position])


TERNARY: dict[str, Function] = {
    "addcmul": lambda x, y, z: torch.addcmul(x, y, z, value=0.5),
    "addcdiv": lambda x, y, z: torch.addcdiv(x, y, z.abs() + 1, value=2),
    "lerp": torch.lerp,
    "lerp_scalar": lambda x, y, z: torch.lerp(x, y + z, 0.7),
    "clamp": lambda x, y, z: torch.clamp(x, y, z),
    "masked_fill": lambda x, y, z: x.masked_fill(y > z, -1e9),
}


def test_ternary() -> None:
    check_all(TERNARY, f(2, 3), f(3), f(2, 1))


def _in_place_views(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1] += 2.0
    y[0].mul_(3)
    y[..., ::2] = 0.5
    y[1:, :2] = x[1:, 1:3]
    y.transpose(0, 1)[2].fill_(4.0)
    return y


SHAPES: dict[str, Function] = {
    "view": lambda x: x.view(4, -1),
    "reshape_transposed": lambda x: x.transpose(0, 2).reshape(6, 4),
    "flatten": lambda x: torch.flatten(x, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "permute": lambda x: x.permute(2, 0, -2),
    "movedim": lambda x: x.movedim((0, 1), (2, 0)),
    "squeeze": lambda x: x[:1].squeeze(0).unsqueeze(-1).squeeze(),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "expand_front": lambda x: x.expand(2, *x.shape),
    "repeat": lambda x: x.repeat(2, 1, 3, 1),
    "tile": lambda x: x.tile((2, 2)),
    "repeat_interleave": lambda x: (x.repeat_interleave(2, 1), x.repeat_interleave(3)),
    "select": lambda x: (x[1], x[:, -1], x.select(2, 3)),
    "slices": lambda x: (x[:, 1:], x[..., ::2], x[:, -2:, :-1], x[:, 5:]),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "split": lambda x: x.split(3, 2),
    "split_sizes": lambda x: x.split([1, 2], 1),
    "chunk": lambda x: x.chunk(3, -1),
    "unbind": lambda x: x.unbind(1),
    "tensor_split": lambda x: torch.tensor_split(x, 3, 2),
    "cat": lambda x: torch.cat([x, x * 2, x[:, :0]], 1),
    "stack": lambda x: torch.stack([x, -x], -1),
    "hstack_mixed": lambda x: torch.hstack([x, x.long()]),
    "flip": lambda x: x.flip(0, 2),
    "roll": lambda x: (x.roll(1), x.roll((1, -2), (0, 2))),
    "rot90": lambda x: torch.rot90(x, 1, (1, 2)),
    "tril": lambda x: (x.tril(), x.triu(1), x.tril(-1)),
    "diagonal": lambda x: (x.diagonal(0, 1, 2), x.diagonal(1), x.diagonal(-1, 2, 0)),
    "unfold": lambda x: x.unfold(2, 2, 1),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij"),
    "pad_constant": lambda x: F.pad(x, (1, 2, 0, 1), value=1.5),
    "pad_negative": lambda x: F.pad(x, (-1, 2)),
    "pad_reflect": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (1, 2), mode="replicate"),
    "pad_circular": lambda x: F.pad(x, (1, 2), mode="circular"),
    "pad_bool": lambda x: F.pad(x > 0, (1, 1), value=True),
    "in_place_views": _in_place_views,
    "contiguous": lambda x: x.transpose(0, 1).contiguous().detach().clone(),
    "einsum": lambda x: (torch.einsum("abc,dbc->ad", x, x), torch.einsum("abc->cb", x)),
    "as_bool_cat": lambda x: torch.cat([x > 0, x < 1]),
    "channel_shuffle": lambda x: F.channel_shuffle(torch.stack([x] * 4, 1), 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(torch.stack([x] * 4, 1), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x.reshape(1, 4, 6), 2),
}


def test_shapes() -> None:
    check_all(SHAPES, f(2, 3, 4))


REDUCTIONS: dict[str, Function] = {
    "sum": lambda x: (x.sum(), x.sum(1), x.sum((0, 2), keepdim=True), (x > 0).sum(1), x.sum(-1, dtype=torch.float64)),
    "mean": lambda x: (x.mean(), x.mean(-1, keepdim=True), x.mean((1, 2))),
    "extremes": lambda x: (x.amax((0, 1)), x.amin(-1), x.max(), x.min(), *x.max(1), *x.min(2, keepdim=True)),
    "arg": lambda x: (x.argmax(), x.argmin(1), x.argmax(2, keepdim=True)),
    "any_all": lambda x: ((x > 2).any(), (x > -2).all(1), (x > 2).any(2, keepdim=True)),
    "var": lambda x: (x.var(1), x.std(), x.var(2, correction=0), *torch.var_mean(x, 1), x.std((0, 1), keepdim=True)),
    "norms": lambda x: (x.norm(), x.norm(dim=1), x.norm(1, 2), torch.linalg.vector_norm(x, math.inf, 1), x.norm(3, 1)),
    "logsumexp": lambda x: (x.logsumexp(1), x.logsumexp((0, 2), keepdim=True)),
    "softmax": lambda x: (x.softmax(-1), x.log_softmax(0), F.softmin(x, 1), F.softmax(x, 1, dtype=torch.float64)),
    "cumsum": lambda x: (x.cumsum(1), (x > 0).cumsum(-1)),
    "topk": lambda x: x.topk(1, 1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0) + 1, dim=2),
    "count_nonzero": lambda x: x.relu().count_nonzero(1),
    "glu": lambda x: F.glu(x, 2),
    "diff": lambda x: x.diff(dim=1),
}


def test_reductions() -> None:
    check_all(REDUCTIONS, f(2, 3, 4))


INDEXING: dict[str, Function] = {
    "index_select": lambda x, n: x.index_select(1, n),
    "tensor": lambda x, n: (x[n], x[:, n], x[:, :, n]),
    "negative": lambda x, n: x[:, n - 2],
    "two": lambda x, n: (x[n, n], x[n[:, None], n], x[n, :, n], x[:, n, n[:, None]]),
    "constants": lambda x, n: x[:, torch.tensor([2, 0, -1])],
    "constant_mask": lambda x, n: x[:, torch.arange(3) != 1],
    "gather": lambda x, n: x.gather(1, n[None, :, None].expand(2, 3, 4)),
    "take_along_dim": lambda x, n: torch.take_along_dim(x, x.argmax(1, keepdim=True), 1),
    "embedding": lambda x, n: F.embedding(n, x[0]),
    "one_hot_like": lambda x, n: (n[:, None] == torch.arange(4)).float(),
    "take": lambda x, n: x.take(n),
}


def test_indexing() -> None:
    check_all(INDEXING, f(2, 3, 4), torch.tensor([1, 0, 1]))


def test_constants_are_folded() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1]
        mask = torch.full((n, n), -math.inf).triu(1) + torch.zeros(n, n)
        position = torch.arange(n, device=x.device).to(x.dtype) / torch.linspace(1, 2, n) + torch.eye(n)[0]
        return (x + mask).softmax(-1) + position + torch.ones_like(x) * 2 + x.new_full((n,), 3.0)

    used = check(masked, f(2, 5, 5))
    assert used <= {"input", "const", "broadcast", "add", "mul", "softmax"}


PRODUCTS: dict[str, tuple[Function, Sequence[tuple[int, ...]]]] = {
    "mm": (torch.mm, [(3, 4), (4, 5)]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "matmul_broadcast": (torch.matmul, [(2, 1, 3, 4), (5, 4, 2)]),
    "matmul_matrix": (torch.matmul, [(2, 3, 4), (4, 5)]),
    "matmul_vector": (lambda x, y: (x @ y, y @ x.mT, y @ y), [(3, 4), (4,)]),
    "mv": (torch.mv, [(3, 4), (4,)]),
    "addmm": (lambda x, y, z: (torch.addmm(x, y, z), torch.addmm(x, y, z, beta=0.5, alpha=2)), [(5,), (3, 4), (4, 5)]),
    "baddbmm": (lambda x, y, z: torch.baddbmm(x, y, z, beta=0), [(2, 3, 5), (2, 3, 4), (2, 4, 5)]),
    "addbmm": (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)]),
    "bilinear": (F.bilinear, [(5, 3), (5, 4), (2, 3, 4), (2,)]),
    "outer": (torch.outer, [(3,), (4,)]),
    "tensordot": (lambda x, y: torch.tensordot(x, y, dims=([1, 2], [1, 0])), [(2, 3, 4), (4, 3, 5)]),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)]),
    "attention_causal": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3), [(1, 2, 5, 4)]),
    "attention_3d": (F.scaled_dot_product_attention, [(3, 5, 4), (3, 6, 4), (3, 6, 4)]),
    "attention_mask": (lambda q, m: F.scaled_dot_product_attention(q, q, q, m), [(2, 3, 5, 4), (1, 1, 5, 5)]),
    "attention_bool": (lambda q, m: F.scaled_dot_product_attention(q, q, q, m > 0), [(2, 3, 5, 4), (2, 1, 1, 5)]),
    "attention_groups": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        [(1, 4, 5, 4), (1, 2, 5, 4)],
    ),
}


def test_products() -> None:
    arguments = tuple(tuple(f(*shape) for shape in shapes) for _, shapes in PRODUCTS.values())
    rows = list(PRODUCTS.items())
    check_all({name: partial(_row, function, position) for position, (name, (function, _)) in enumerate(rows)}, *arguments)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 7, 6)),
    "conv2d_dilated": (lambda: nn.Conv2d(4, 4, 3, dilation=2, groups=4, bias=False), (1, 4, 9, 8)),
    "conv2d_same": (lambda: nn.Conv2d(3, 2, (2, 4), padding="same"), (1, 3, 5, 6)),
    "conv2d_reflect": (lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), (1, 3, 5, 6)),
    "conv2d_circular": (lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), (1, 3, 5, 6)),
    "conv2d_unbatched": (lambda: nn.Conv2d(3, 2, 3), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 1, 2), (2, 4, 9)),
    "conv1d_unbatched": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (4, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 5, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (2, 4, 5)),
    "linear": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear_1d": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "batch_norm3d": (lambda: nn.BatchNorm3d(3, affine=False), (2, 3, 2, 2, 2)),
    "batch_norm_no_statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    "layer_norm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer_norm_plain": (lambda: nn.LayerNorm(4, elementwise_affine=False), (2, 3, 4)),
    "rms_norm": (lambda: nn.RMSNorm(4), (2, 3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    "instance_norm": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 4)),
    "instance_norm_tracked": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (2, 3, 4)),
    "local_response_norm": (lambda: nn.LocalResponseNorm(3), (1, 4, 5, 5)),
    "prelu": (lambda: nn.PReLU(3), (2, 3, 4)),
    "max_pool2d": (lambda: nn.MaxPool2d(3, 2, 1), (2, 3, 8, 7)),
    "max_pool2d_ceil": (lambda: nn.MaxPool2d((2, 3), dilation=(1, 2), ceil_mode=True), (1, 2, 7, 9)),
    "max_pool1d": (lambda: nn.MaxPool1d(3, 2, 1), (2, 3, 9)),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 3, 8, 7)),
    "avg_pool2d_divisor": (lambda: nn.AvgPool2d(3, 1, 1, divisor_override=5), (1, 2, 5, 5)),
    "avg_pool1d": (lambda: nn.AvgPool1d(2), (2, 3, 9)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d((3, None)), (2, 3, 7, 5)),
    "adaptive_avg_pool1d": (lambda: nn.AdaptiveAvgPool1d(3), (2, 3, 7)),
    "adaptive_max_pool2d": (lambda: nn.AdaptiveMaxPool2d(2), (2, 3, 6, 4)),
    "adaptive_max_pool1d": (lambda: nn.AdaptiveMaxPool1d(1), (2, 3, 6)),
    "global_max_pool2d": (lambda: nn.AdaptiveMaxPool2d(1), (2, 3, 5, 7)),
    "max_pool3d": (lambda: nn.MaxPool3d(3, 2, 1), (2, 3, 5, 6, 7)),
    "avg_pool3d": (lambda: nn.AvgPool3d((2, 3, 1), padding=(1, 0, 0), count_include_pad=False), (1, 2, 5, 6, 7)),
    "adaptive_max_pool2d_uneven": (lambda: nn.AdaptiveMaxPool2d((3, 2)), (2, 3, 7, 5)),
    "lp_pool": (lambda: nn.LPPool2d(2, 2), (1, 2, 6, 6)),
    "upsample_nearest": (lambda: nn.Upsample(scale_factor=2.5), (1, 2, 4, 5)),
    "upsample_nearest_size": (lambda: nn.Upsample(size=(7, 3)), (1, 2, 4, 5)),
    "upsample_nearest1d": (lambda: nn.Upsample(scale_factor=2), (1, 2, 5)),
    "upsample_nearest_exact": (lambda: nn.Upsample(size=(7, 3), mode="nearest-exact"), (1, 2, 4, 5)),
    "upsample_bilinear": (lambda: nn.Upsample(scale_factor=1.7, mode="bilinear"), (1, 2, 4, 5)),
    "upsample_bilinear_corners": (lambda: nn.Upsample(size=(9, 6), mode="bilinear", align_corners=True), (1, 2, 4, 5)),
    "upsample_linear1d": (lambda: nn.Upsample(scale_factor=2, mode="linear"), (1, 2, 5)),
    "upsample_bicubic": (lambda: nn.Upsample(size=(7, 6), mode="bicubic"), (1, 2, 4, 5)),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), (1, 8, 3, 2)),
    "unfold": (lambda: nn.Unfold((2, 3), dilation=(2, 1), padding=1, stride=2), (2, 3, 6, 7)),
    "pads": (lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.ReplicationPad2d((0, 1, 2, 0)), nn.ZeroPad2d(1)), (1, 2, 4, 4)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()), (2, 3, 4, 4)),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (2, 4)),
}


class Side(nn.Module):
    """Many layers side by side, each on its own input."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: layer(inputs[name]) for name, layer in self.layers.items()}


def test_layers() -> None:
    torch.manual_seed(0)
    side = Side({name: make() for name, (make, _) in LAYERS.items()})
    for name, buffer in side.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.uniform_(-0.5, 0.5)
    check(side, {name: f(*shape) for name, (_, shape) in LAYERS.items()})


def test_whole_operators_stay_whole() -> None:
    """What the passes match must reach the IR as one operator."""
    image = f(1, 4, 6, 6)
    assert "conv2d" in check(nn.Conv2d(4, 4, 3), image)
    assert "batch_norm" in check(nn.BatchNorm2d(4), image)
    assert "group_norm" in check(nn.GroupNorm(2, 4), image)
    assert "resize" in check(nn.Upsample(scale_factor=2), image)
    for name in ("gelu", "silu", "hardswish", "hardsigmoid", "elu", "softmax"):
        function = getattr(F, name) if name != "softmax" else (lambda x: F.softmax(x, -1))
        assert check(function, image) == {"input", name}
    assert check(lambda q: F.scaled_dot_product_attention(q, q, q), image) == {"input", "scaled_dot_product_attention"}


def test_zero_size_and_0d() -> None:
    check(lambda x: x * 2 + 1, torch.tensor(3.0))
    check(lambda x: (x.relu(), x.sum(1), torch.cat([x, x], 1)), torch.zeros(2, 0, 3))
    check(nn.Linear(3, 2), torch.zeros(0, 3))
    check(lambda x: (x.softmax(0), x.sum(0), x.unsqueeze(0), x.cumsum(0)), torch.tensor(3.0))


def test_table_names_real_operators() -> None:
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers those of PT2E
    for name in TABLE:
        namespace, packet, overload = name.split(".")
        assert getattr(getattr(getattr(torch.ops, namespace), packet), overload)
