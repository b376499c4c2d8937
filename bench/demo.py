"""`make demo`: train a small residual CNN on digits, compile, prune, fine-tune and quantize it, and show what each step keeps
and gains; then ResNet-18.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import paring
from paring.bench.networks import ResNet, resnet18

console = Console()


def digits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """scikit-learn's digits as (N, 1, 8, 8) images in [0, 1]: 1,437 to train on, 360 to test on."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target[order])
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def descend(model: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], count: int, size: int, epochs: int) -> None:
    """AdamW with a one-cycle learning rate on `loss` of batches of so many of `count` samples, given by their numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = epochs * -(-count // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    for _ in range(epochs):
        for batch in torch.randperm(count).split(size):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            schedule.step()


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Cross entropy, on batches of 64."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        progress.advance(task, len(batch))
        return nn.functional.cross_entropy(model(images[batch]), labels[batch])

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=epochs * len(images))
        descend(model, loss, len(images), 64, epochs)
    model.eval()


def distil(model: nn.Module, teacher: nn.Module, images: torch.Tensor, epochs: int) -> None:
    """A hook for `finetune`: towards the dense network's own answers (Hinton et al. 2015), on batches of 16."""
    with torch.no_grad():
        wanted = teacher(images)
    descend(model, lambda batch: nn.functional.mse_loss(model(images[batch]), wanted[batch]), len(images), 16, epochs)


def accuracy(net: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers, one image at a time, as the network was compiled."""
    with torch.no_grad():
        right = sum(int(net(image[None]).argmax()) == int(label) for image, label in zip(images, labels, strict=True))
    return right / len(images)


def race(systems: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of each system, in interleaved rounds of one process.

    A first look, not a benchmark: `paring bench` gives each system a process of its own.
    """
    times: dict[str, list[float]] = {name: [] for name in systems}
    for run in systems.values():
        run()
    for _ in range(rounds):
        for name, run in systems.items():
            start = time.perf_counter()
            for _ in range(3):
                run()
            times[name].append((time.perf_counter() - start) / 3 * 1e3)
            # torch's threads spin for a while after a call and would slow down whoever comes next.
            time.sleep(0.02)
    return {name: statistics.median(samples) for name, samples in times.items()}


def peers(model: nn.Module, x: torch.Tensor, inductor: bool) -> dict[str, Callable[[], object]]:
    def guarded(function: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x)

        return run

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    systems = {"torch eager": guarded(model), "torch eager, channels last": guarded(last)}
    if inductor:
        import torch._inductor.config as config

        config.freezing = True
        systems["torch Inductor (freezing)"] = guarded(torch.compile(model))
    return systems


# What is left of the multiply-adds, found layer by layer, and then trained for two epochs.
PRUNE, TUNED = "prune-search{macs=0.5}", "prune-search{macs=0.5}, finetune"
STEPS = {"compiled": "", "pruned": PRUNE, "fine-tuned": TUNED, "quantized": f"{TUNED}, quantize"}


def compile_with_progress(model: nn.Module, x: torch.Tensor, dump: Path | None = None, **options: Any) -> paring.Network:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"compiling: {stage}", completed=done, total=total or None)

        return paring.compile(model, (x,), target="native", dump=dump, progress=tell, **options)


def step_by_step(model: nn.Module, data: tuple[torch.Tensor, ...]) -> None:
    """Each step of compression on top of those before it: accuracy on the test images, size, work and time."""
    images, _, test_images, test_labels = data
    nets: dict[str, paring.Network] = {}
    for name, passes in STEPS.items():
        torch.manual_seed(0)
        tune = functools.partial(distil, teacher=model, images=images, epochs=2) if "finetune" in passes else None
        batches = list(images[:256].split(1)) if passes else None
        options = {"passes": passes, "calibration": batches, "finetune": tune} if passes else {}
        nets[name] = compile_with_progress(model, test_images[:1], **options)
    times = race({name: functools.partial(net, test_images[:1]) for name, net in nets.items()})
    columns = ("step", "accuracy", "parameters KiB", "million multiply-adds", "median us", "times as fast")
    table = Table(*columns, title="step by step, one image")
    for name, net in nets.items():
        size = net.ledger.entries[-1].after
        right = accuracy(net, test_images, test_labels)
        row = (f"{right:.2%}", f"{size.parameter_bytes / 1024:.0f}", f"{size.macs / 1e6:.2f}", f"{times[name] * 1e3:.0f}")
        table.add_row(name, *row, f"{times['compiled'] / times[name]:.2f}")
    console.print(table)
    for entry in nets["quantized"].ledger.entries:
        if entry.name.startswith("prune-search"):
            print("\n".join(entry.remarks()))


def show_race(title: str, times: dict[str, float]) -> None:
    console.print(
        "one process, interleaved: a first look. On a busy machine spinning threads suffer most; `paring bench` measures."
    )
    table = Table("system", "median ms", "its time / Paring's", title=title)
    for name, value in times.items():
        table.add_row(name, f"{value:.3f}", "" if name == "Paring" else f"{value / times['Paring']:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of training on the digits")
    parser.add_argument("--no-inductor", action="store_true", help="leave torch Inductor out; it compiles for a minute")
    parser.add_argument("--dump", type=Path, default=Path("build/demo"), help="folder for the IR after each pass")
    options = parser.parse_args()
    threads = paring.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    console.rule("1. train a small residual CNN on scikit-learn's digits")
    images, labels, test_images, test_labels = digits()
    model = ResNet((1, 1, 1), (32, 64, 128), 10, channels=1, large=False)
    start = time.perf_counter()
    train(model, images, labels, options.epochs)
    console.print(f"{options.epochs} epochs in {time.perf_counter() - start:.1f} s")
    before = accuracy(model, test_images, test_labels)

    console.rule("2. compile it")
    x = test_images[:1]
    net = compile_with_progress(model, x, options.dump)
    after = accuracy(net, test_images, test_labels)
    console.print(f"target {net.target.name}, {threads} threads. accuracy: torch {before:.2%}, compiled {after:.2%}")
    print(net.ledger)
    console.print(f"the program after each pass lies in {options.dump}: read 000_import.ir, then the others")
    show_race("the small CNN, one image", race({"Paring": lambda: net(x), **peers(model, x, not options.no_inductor)}))

    console.rule("3. prune it, fine-tune it, quantize it")
    step_by_step(model, (images, labels, test_images, test_labels))

    console.rule("4. ResNet-18 at 224x224, random weights")
    large, (image,) = resnet18()
    fast = compile_with_progress(large, image)
    print(fast.profile(image))
    show_race("ResNet-18, one image", race({"Paring": lambda: fast(image), **peers(large, image, not options.no_inductor)}))
    if before - after > 0.005:
        raise SystemExit("the compiled network lost accuracy: this is a bug")


if __name__ == "__main__":
    main()
