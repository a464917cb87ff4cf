"""The other runtimes that a codec can be exported to, as sides of `throughput.py`: ONNX Runtime, OpenVINO and ncnn.

All of them compute on CPUs in float32 here, on as many threads as torch has, for one shape of input that they were made
for: what each does best. None of them is needed by latentcodec; `pip install latentcodec[bench]` brings those that have
wheels. A model is exported through ONNX (ncnn: through TorchScript and pnnx) into a temporary folder.

Shapes: B batch, C channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

Runner = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> the posterior's mode, or latents [B, c, h, w] -> images."""

PACKAGES = {
    "ONNX Runtime": ("onnxruntime", "onnx", "onnxscript"),
    "OpenVINO": ("openvino", "onnx", "onnxscript"),
    "ncnn": ("ncnn", "pnnx"),
}
"""What must be installed for each."""


def missing(peer: str) -> list[str]:
    """The packages that a peer needs and that are not installed."""
    return [name for name in PACKAGES[peer] if importlib.util.find_spec(name) is None]


class Call(nn.Module):
    """One direction of a VAE as a network of its own, to be exported."""

    def __init__(self, vae: AutoencoderKL, direction: str) -> None:
        super().__init__()
        self.vae, self.direction = vae, direction

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor
        if self.direction == "encode":
            result = self.vae.encode(x).latent_dist.mode()
        else:
            result = self.vae.decode(x).sample
        return result


def runner(peer: str, vae: AutoencoderKL, direction: str, example: Tensor) -> Runner:
    """`vae` (diffusers' own class, float32, on a CPU) in `direction` by `peer`, for inputs of the example's shape."""
    network = Call(vae, direction).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if peer == "ncnn":
            return _ncnn(network, example, Path(folder))
        path = Path(folder, "model.onnx")
        torch.onnx.export(network, (example,), path, dynamo=True, verbose=False)
        return _onnx_runtime(path) if peer == "ONNX Runtime" else _openvino(path)


def _onnx_runtime(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(path: Path) -> Runner:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[request.model_outputs[0]].copy())


def _ncnn(network: nn.Module, example: Tensor, folder: Path) -> Runner:
    import ncnn

    traced, stem = folder / "model.pt", folder / "model"
    torch.jit.trace(network, example, check_trace=False).save(traced)
    shape = "[" + ",".join(map(str, example.shape)) + "]f32"
    subprocess.run(
        [_pnnx(), str(traced), f"inputshape={shape}", "fp16=0"], cwd=folder, check=True, capture_output=True
    )
    net: Any = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    if net.load_param(f"{stem}.ncnn.param") or net.load_model(f"{stem}.ncnn.bin"):
        raise RuntimeError("ncnn could not load the network that pnnx made")

    def run(x: Tensor) -> Tensor:
        results = []
        for image in x:  # ncnn knows no batch
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(image.contiguous().numpy()).clone())
            results.append(torch.from_numpy(extractor.extract("out0")[1].numpy().copy()))
        return torch.stack(results)

    return run


def _pnnx() -> str:
    """The program that comes with the package of its name."""
    import pnnx

    return str(pnnx.EXEC_PATH)
