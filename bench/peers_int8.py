"""The systems that are timed on 8-bit integers: each quantizes the float model with its own tools, on the same data."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from paring.bench.peers import Compiled, Peer, Run, openvino_request, ort_sessions

if TYPE_CHECKING:
    import torch

    from paring.bench.peers import Inputs

# Batches of calibration data. Speed does not depend on their values, and accuracy is measured elsewhere.
BATCHES = 4


def calibration(inputs: Inputs) -> list[Inputs]:
    """Inputs like these: normal numbers, or tokens of the same range; the first are the given ones."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def like(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator)
        return torch.randint(0, int(x.max()) + 1, x.shape, generator=generator)

    return [inputs, *(tuple(map(like, inputs)) for _ in range(BATCHES - 1))]


def paring(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    product: Any = import_module("paring")
    product.set_num_threads(threads)
    return Compiled(product.compile(model, inputs, target="native", passes="quantize", calibration=calibration(inputs)), inputs)


def ort(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    import torch

    tools: Any = import_module("onnxruntime.quantization")
    program: Any = torch.onnx.export(model, inputs, dynamo=True, verbose=False)

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            names = [spec.name for spec in program.model_proto.graph.input]
            self.feeds = iter([dict(zip(names, (x.numpy() for x in batch), strict=True)) for batch in calibration(inputs)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    with TemporaryDirectory(prefix="paring-bench-") as folder:
        whole, prepared, quantized = (str(Path(folder) / f"{name}.onnx") for name in ("whole", "prepared", "quantized"))
        program.save(whole)
        tools.quant_pre_process(whole, prepared)
        tools.quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
        )
        return ort_sessions(Path(quantized).read_bytes(), inputs, threads)


def openvino(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    import torch

    ov, nncf = import_module("openvino"), import_module("nncf")
    converted = ov.convert_model(torch.export.export(model, inputs))
    data = nncf.Dataset([tuple(x.numpy() for x in batch) for batch in calibration(inputs)])
    quantized = nncf.quantize(converted, data, preset=nncf.QuantizationPreset.MIXED, subset_size=BATCHES)
    return openvino_request(quantized, inputs, threads)


INT8_PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("paring-int8", paring, "target native, pass quantize with its default settings, no tuning", "int8"),
        Peer("ort-int8", ort, "its own static quantization: QDQ, per channel, u8 x s8; otherwise as ort", "int8"),
        Peer("openvino-int8", openvino, "NNCF, preset MIXED; otherwise as openvino", "int8"),
    )
}
