"""The models of the bench, as data. Each is a real architecture with seeded random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Options = dict[str, Any]
Built = tuple["torch.nn.Module", tuple["torch.Tensor", ...]]


@dataclass(frozen=True)
class Model:
    """One row: `factory(shape)` gives the raw module, `shape` its input for timing, `small` its input for tests."""

    name: str
    suite: str
    factory: Callable[[Shape], torch.nn.Module]
    shape: Shape
    small: Shape
    coverage_only: bool = False
    masked: bool = False

    def build(self, small: bool = False) -> Built:
        """The module in eval mode and its example inputs; the same numbers at every call, in every process."""
        import torch

        shape = self.small if small else self.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(crc32(self.name.encode()))
            module = self.factory(shape).eval()
            enliven(module)
            inputs = self._inputs(shape)
            if len(shape) == 4:
                settle_batch_norms(module, torch.randn(4, *self.shape[1:]))
        return module, inputs

    def _inputs(self, shape: Shape) -> tuple[torch.Tensor, ...]:
        import torch

        if len(shape) == 4:
            return (torch.randn(shape),)
        tokens = torch.randint(0, VOCABULARY, shape)
        if not self.masked:
            return (tokens,)
        mask = torch.ones(shape, dtype=torch.int64)
        mask[:, shape[1] * 3 // 4 :] = 0
        return (tokens, mask)


VOCABULARY = 8192


def enliven(module: torch.nn.Module) -> None:
    """Spread every parameter that starts as one constant: zeroed heads and 1e-6 layer scales would hide errors."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            value = float(parameter.flatten()[0])
            if parameter.numel() == 1 or not bool((parameter == value).all()):
                continue
            if value == 1:
                parameter.uniform_(0.5, 1.5)
            elif value != 0:
                parameter.uniform_(0.05, 0.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1)


def settle_batch_norms(module: torch.nn.Module, images: torch.Tensor) -> None:
    """Give each batch norm statistics near, not at, those of its input: the mean off by N(0, 0.1) of a deviation, the
    variance by a factor U(0.5, 1.5). Drawn blindly, they make Inception reach 1e11 and MobileNetV2 ignore its input.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    def settle(norm: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance, mean = torch.var_mean(arguments[0], dim=(0, 2, 3), correction=0)
        variance = variance.clamp_min(1e-3)
        norm.running_mean.copy_(mean + variance.sqrt() * torch.randn_like(mean) * 0.1)
        norm.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 1.5))

    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    try:
        if norms:
            with torch.no_grad():
                module(images)
    finally:
        for hook in hooks:
            hook.remove()


def torchvision_model(path: str, shape: Shape, sized: bool = False, **options: Any) -> torch.nn.Module:
    define_torchvision_ops()
    module, _, name = f"torchvision.models.{path}".rpartition(".")
    if sized:
        options["image_size"] = shape[-1]
    built: torch.nn.Module = getattr(import_module(module), name)(weights=None, **options)
    return built


@cache
def define_torchvision_ops() -> object:
    """torchvision's wheels are built for CUDA; where its C++ library does not load, its Python models need only the
    schemas of those operators. The returned Library must stay alive, hence the cache.
    """
    import torch

    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    untyped: Any = torch
    try:
        for binary in Path(spec.origin).parent.glob("_C*.so"):
            untyped.ops.load_library(str(binary))
            return None
    except OSError:
        pass
    schemas: Any = untyped.library.Library("torchvision", "DEF")
    for schema in TORCHVISION_SCHEMAS:
        schemas.define(schema)
    return schemas


_BOXES = "Tensor dets, Tensor scores, float iou_threshold"
_ROIS = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
TORCHVISION_SCHEMAS = (
    f"nms({_BOXES}) -> Tensor",
    f"qnms({_BOXES}) -> Tensor",
    f"roi_align({_ROIS}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align({_ROIS}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align({_ROIS}, int sampling_ratio) -> (Tensor, Tensor)",
    f"roi_pool({_ROIS}) -> (Tensor, Tensor)",
    f"ps_roi_pool({_ROIS}) -> (Tensor, Tensor)",
    # never called: only their names are looked up when torchvision registers its gradients
    "deform_conv2d(Tensor input) -> Tensor",
    "_roi_align_backward(Tensor grad) -> Tensor",
    "_ps_roi_align_backward(Tensor grad) -> Tensor",
    "_roi_pool_backward(Tensor grad) -> Tensor",
    "_ps_roi_pool_backward(Tensor grad) -> Tensor",
    "_deform_conv2d_backward(Tensor grad) -> Tensor",
)


def timm_model(name: str, shape: Shape) -> torch.nn.Module:
    define_torchvision_ops()
    built: torch.nn.Module = import_module("timm").create_model(name, pretrained=False, img_size=shape[-1])
    return built


def transformers_model(model: str, config: str, shape: Shape, **options: Any) -> torch.nn.Module:
    define_torchvision_ops()  # transformers imports torchvision wherever it is installed
    library = import_module("transformers")
    if len(shape) == 4:
        options["image_size"] = shape[-1]
    else:
        options |= {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    built: torch.nn.Module = getattr(library, model)(getattr(library, config)(**options))
    return built


IMAGE, THUMB = (1, 3, 224, 224), (1, 3, 64, 64)
TEXT, PHRASE = (1, 128), (1, 16)


def _vision(name: str, path: str = "", suite: str = "coverage", small: Shape = THUMB, **options: Any) -> Model:
    factory = partial(torchvision_model, path or name, **options)
    return Model(name, suite, factory, IMAGE, small, coverage_only=suite == "coverage")


def _timm(name: str, path: str) -> Model:
    return Model(name, "transformer", partial(timm_model, path), IMAGE, THUMB)


def _hugging(
    name: str, model: str, suite: str = "coverage", small: Shape = PHRASE, masked: bool = False, **options: Any
) -> Model:
    factory = partial(transformers_model, f"{model}Model", f"{model}Config", **options)
    if model in HEADS:
        factory = partial(transformers_model, HEADS[model], f"{model}Config", **options)
    full = IMAGE if len(small) == 4 else TEXT
    return Model(name, suite, factory, full, small, coverage_only=suite == "coverage", masked=masked)


HEADS = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "T5": "T5EncoderModel"}
BERT: Options = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "initializer_range": 0.06}
GPT2: Options = {"n_embd": 256, "n_head": 4, "n_positions": 256, "initializer_range": 0.06, "use_cache": False}
VIT: Options = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
T5: Options = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4, "use_cache": False}
LLAMA: Options = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 8}
NO_HEADS: Options = {"aux_logits": False, "init_weights": True}

_TABLE = (
    _vision("resnet18", suite="cnn"),
    _vision("resnet50", suite="cnn"),
    _vision("mobilenet_v2", suite="cnn"),
    _vision("efficientnet_b0", suite="cnn"),
    _vision("convnext_tiny", suite="cnn"),
    _timm("vit_tiny", "vit_tiny_patch16_224"),
    _timm("deit_small", "deit_small_patch16_224"),
    _hugging("bert_small", "Bert", suite="transformer", num_hidden_layers=4, **BERT),
    _hugging("gpt2_small", "GPT2", suite="transformer", n_layer=4, **GPT2),
    _vision("mobilenet_v3_small"),
    _vision("squeezenet1_1"),
    _vision("densenet121"),
    _vision("vgg11_bn"),
    _vision("googlenet", **NO_HEADS),
    _vision("inception_v3", small=(1, 3, 96, 96), **NO_HEADS),
    _vision("shufflenet_v2_x1_0"),
    _vision("regnet_y_400mf"),
    _vision("mnasnet0_5"),
    _vision("vit_b_16", sized=True),
    _vision("swin_t"),
    _vision("fcn_resnet50", path="segmentation.fcn_resnet50", weights_backbone=None),
    _hugging("bert", "Bert", masked=True, num_hidden_layers=2, **BERT),
    _hugging("distilbert", "DistilBert", dim=256, n_layers=2, n_heads=4, hidden_dim=1024),
    _hugging("gpt2", "GPT2", n_layer=2, **GPT2),
    _hugging("vit", "ViT", small=THUMB, **VIT),
    _hugging("t5_encoder", "T5", **T5),
    _hugging("llama", "Llama", num_key_value_heads=4, use_cache=False, initializer_range=0.06, **LLAMA),
)

MODELS: dict[str, Model] = {model.name: model for model in _TABLE}


def suite_models(suite: str) -> tuple[str, ...]:
    """The names in a suite; `coverage` is all of them, since what is timed must be right as well."""
    names = tuple(m.name for m in _TABLE if suite == "coverage" or m.suite == suite)
    if not names:
        suites = ", ".join(sorted({m.suite for m in _TABLE}))
        raise KeyError(f"no suite {suite!r}; there are: {suites}")
    return names


def __getattr__(name: str) -> Callable[..., Built]:
    """`paring.bench.models:resnet18` on the command line: each row is also a factory of this module."""
    if name in MODELS:
        return MODELS[name].build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
