"""What passes ask of torch: training between steps of pruning, and gradients of a loss on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paring.frontends.structure import Signature
from paring.ir.errors import ArgumentError, ParingError, a_kind
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.passes.rewriter import failure

Hook = Callable[[Any], Any]
Loss = Callable[[Any, int], Any]
# The same directions for the same outputs, whatever else was drawn.
SEED = 0
SIGNS = np.array([-1.0, 1.0])


def fine_tuner(hook: Hook | None) -> Callable[[Graph], Graph] | None:
    """The user's hook as a function of graphs: trains the weights of one, and gives it with what was learned.

    The hook is given `paring.to_torch(graph, keep_zeros=True)`, with gradients on, whatever the caller has torch do. Weights
    that are zero stay so, those that were initialised to zero too, unless the hook frees them: `del module.masks[name]`.
    Raises ArgumentError where the hook raises, gives something else than that module, changes its architecture, or leaves
    values that are not finite.
    """
    if hook is None:
        return None
    if not callable(hook):
        raise ArgumentError(f"finetune is {a_kind(hook)}", hint="a function that trains the module it is given")

    def tune(graph: Graph) -> Graph:
        import torch

        from paring.frontends.torch_module import from_torch, to_torch

        with torch.inference_mode(False):
            module = to_torch(graph, keep_zeros=True)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                result: object = hook(module)
        except ParingError:
            raise
        except Exception as error:
            raise ArgumentError(failure("the hook finetune", error).what, why=str(error)) from error
        if result is not None and result is not module:
            hint = "train the module in place, and return it or nothing: its architecture is that of the network"
            raise ArgumentError(f"the hook finetune gives {a_kind(result)}, not the module it was given", hint=hint)
        try:
            return from_torch(module)
        except ParingError as error:
            error.at("after the hook finetune")
            raise

    return tune


def loss_gradients(
    loss: Loss | None, calibration: Sequence[Sequence[Array]], signature: Signature
) -> Callable[[Graph], Iterator[Mapping[tuple[Node, int], Array]]]:
    """For a graph the gradient of a loss by each operand that is learned, batch by batch of the calibration data.

    Raises ArgumentError where the user's loss raises or gives no number that hangs on the weights.
    """

    def gradients(graph: Graph) -> Iterator[Mapping[tuple[Node, int], Array]]:
        import torch

        from paring.frontends import torch_module

        with torch.inference_mode(False):
            module = torch_module.to_torch(graph)
        for number, batch in enumerate(calibration):
            with torch.inference_mode(False), torch.enable_grad():
                found = module(*(torch.from_numpy(array.copy()) for array in batch))
                outputs = found if isinstance(found, tuple) else (found,)
                value = _own_loss(outputs, number) if loss is None else _users_loss(loss, outputs, number, signature)
                each = torch_module.gradients(module, value)
            yield each

    return gradients


def _own_loss(outputs: Sequence[Any], number: int) -> Any:
    """The sum of all float outputs in a random direction: see `paring.compile`."""
    import torch

    floats = [y for y in outputs if y.is_floating_point()]
    if not floats:
        raise ArgumentError("the network has no float output to take gradients of", hint="a criterion without gradients: l2")
    rng = np.random.default_rng((SEED, number))
    signs = [torch.from_numpy(rng.choice(SIGNS, tuple(y.shape))).to(y.dtype) for y in floats]
    return torch.stack([(y * s).sum() for y, s in zip(floats, signs, strict=True)]).sum()


def _users_loss(loss: Loss, outputs: Sequence[Any], number: int, signature: Signature) -> Any:
    import torch

    try:
        value: object = loss(signature.with_leaves(outputs), number)
    except ParingError:
        raise
    except Exception as error:
        raise ArgumentError(f"the loss raised {type(error).__name__}", where=f"batch {number}", why=str(error)) from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        hint = "a tensor of one element, computed in torch from the outputs it is given"
        raise ArgumentError(f"the loss gives {a_kind(value)} that has no gradient", where=f"batch {number}", hint=hint)
    return value.reshape(())
