"""Networks of our own, for the demo and the tests: they need torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of basic blocks (each but the first halves the image), mean, classifier.

    x: (N, channels, H, W). `large`: the 7x7 stem with max pooling that ImageNet networks have, else one 3x3 convolution.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], classes: int, channels: int = 3, large: bool = True) -> None:
        super().__init__()
        kernel, stride = (7, 2) if large else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.pool: nn.Module = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        stages: list[nn.Module] = []
        before = widths[0]
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(count):
                stages.append(BasicBlock(before, width, 2 if number and not block else 1))
                before = width
        self.stages = nn.Sequential(*stages)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.mean(self.stages(self.pool(self.stem(x)))), 1))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection, and a shortcut where shapes allow (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNet(nn.Module):
    """A network in the style of MobileNetV2: `rows` of (expansion, width, blocks, stride of the first block)."""

    def __init__(self, rows: Sequence[tuple[int, int, int, int]], stem: int, head: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6()]
        before = stem
        for expansion, width, count, stride in rows:
            for block in range(count):
                layers.append(InvertedResidual(before, width, 1 if block else stride, expansion))
                before = width
        layers += [nn.Conv2d(before, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def randomize_statistics(model: nn.Module) -> nn.Module:
    """Batch-norm statistics as after training, not 0 and 1, so that folding them is a test; the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def resnet18() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """ResNet-18 at 224x224 with random weights, for the command line: `paring.bench.networks:resnet18`."""
    torch.manual_seed(0)
    return randomize_statistics(ResNet((2, 2, 2, 2), (64, 128, 256, 512), 1000)), (torch.randn(1, 3, 224, 224),)


def small_resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A ResNet of 8x8 gray images, 10 classes."""
    torch.manual_seed(0)
    model = ResNet((1, 1, 1), (16, 32, 64), 10, channels=1, large=False)
    return randomize_statistics(model), (torch.randn(1, 1, 8, 8),)


def small_mobilenet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A MobileNetV2-style network of 32x32 images, 10 classes; widths that do not fill whole blocks."""
    torch.manual_seed(0)
    model = MobileNet(((1, 8, 1, 1), (4, 12, 2, 2), (4, 24, 2, 2), (4, 40, 1, 1)), 16, 96, 10)
    return randomize_statistics(model), (torch.randn(1, 3, 32, 32),)
