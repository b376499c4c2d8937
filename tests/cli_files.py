"""What the tests of the command line give it: models, plugins and graphs; and a way to call it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from typer.testing import CliRunner

from paring.cli import make_app
from paring.ir import Const, Graph, Input, Node
from paring.ir.ops.binary import Add
from paring.ir.ops.conv import Conv2d
from paring.ir.ops.unary import Relu

MODEL = """
import os
import torch
from torch import nn

os.write(1, b"noise from below\\n")
print("noise")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x, scale=None):
        y = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return {"logits": self.head(y if scale is None else y * scale), "features": y}

def make():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(1, 3, 8, 8),)

def by_name():
    torch.manual_seed(0)
    return Net().eval(), {"x": torch.randn(1, 3, 8, 8), "scale": torch.tensor(2.0)}

def both():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(1, 3, 8, 8),), {"scale": torch.tensor(2.0)}
"""

BAD_MODELS = """
import os, signal, time

def raises():
    raise ValueError("no [bold]luck[/bold] \\x1b[31m")

def lonely():
    return 3

def triple():
    return 1, 2, 3

def quadruple():
    return 1, 2, 3, 4

def odd_inputs():
    return 1, 2

def needs(x):
    return x

def stops():
    raise SystemExit(7)

def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)

number = 5
"""

PLUGIN = """
from dataclasses import dataclass
from paring.ir.ops.unary import Abs, Relu
from paring.passes.base import Pass
from paring.passes.contract import Exact
from paring.passes.pattern import Rule, op

def relu_to_abs(m):
    "relu(x) -> abs(x), which is wrong"
    if m.root.type.shape[1] == 1:
        return m.decline("only one channel")
    return m.make(Abs(), *m.root.inputs)

def fails(m):
    raise KeyError("mine")

@dataclass(frozen=True)
class Wrong(Pass):
    "Turns relu into abs."
    name = "wrong"
    factor: float = 1.0

    def rules(self):
        return (Rule(op(Relu), relu_to_abs, Exact()),)

@dataclass(frozen=True)
class Failing(Pass):
    "Raises."
    name = "failing"

    def rules(self):
        return (Rule(op(Relu), fails, Exact()),)

class NotAPass:
    name = "nothing"
"""


class Result:
    """What a command printed and how it ended."""

    def __init__(self, *arguments: object) -> None:
        found = CliRunner().invoke(make_app(), [str(argument) for argument in arguments], prog_name="paring")
        self.code, self.out, self.err = found.exit_code, found.stdout, found.stderr

    def json(self) -> Any:
        return json.loads(self.out)


def conv_graph(rng: np.random.Generator, depth: int = 2) -> Graph:
    """Residual blocks."""
    x = y = Node(Input("x", "float32", (1, 4, 6, 6)))
    for _ in range(depth):
        weight = Node(Const(rng.standard_normal((4, 4, 3, 3), dtype=np.float32) / 3))
        y = Node(Add(), (Node(Relu(), (Node(Conv2d(padding=((1, 1), (1, 1))), (y, weight)),)), y))
    return Graph((x,), (y,))
