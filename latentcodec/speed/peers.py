"""Other runtimes that a VAE can be exported to, as sides of `bench/throughput.py`: ONNX Runtime, OpenVINO and ncnn.

All compute on CPUs in float32 here, on as many threads as torch has, each for the one shape of input that it was
exported for. `pip install "latentcodec[bench]"` brings them; nothing else needs them. A model is exported through
ONNX, for ncnn through TorchScript and pnnx.

Shapes: B batch, C channels, H W pixels, c latent channels, h w latent cells.
"""

import importlib.util
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Runner = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> the posterior's mode, or latents [B, c, h, w] -> images."""

SIDES = {
    "ONNX Runtime": "diffusers' own class exported to ONNX for one shape of input; float32, CPU",
    "OpenVINO": "the same ONNX file; float32, CPU, tuned for latency",
    "ncnn": "diffusers' own class through TorchScript and pnnx; float32, CPU, image by image",
}
PACKAGES = {
    "ONNX Runtime": ("onnxruntime", "onnx", "onnxscript"),
    "OpenVINO": ("openvino", "onnx", "onnxscript"),
    "ncnn": ("ncnn", "pnnx"),
}
"""What each needs."""


def missing(side: str) -> list[str]:
    """The packages that a side needs and that are not installed."""
    return [name for name in PACKAGES.get(side, ()) if importlib.util.find_spec(name) is None]


class Direction(nn.Module):
    """One direction of a VAE as a network of its own."""

    def __init__(self, vae: Any, direction: str) -> None:
        super().__init__()
        self.vae, self.direction = vae, direction

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor
        if self.direction == "encode":
            result = self.vae.encode(x).latent_dist.mode()
        else:
            result = self.vae.decode(x).sample
        return result


def runner(side: str, vae: Any, direction: str, example: Tensor) -> Runner:
    """`vae` (diffusers' own class, float32, on a CPU) in `direction`, for inputs of the example's shape."""
    with tempfile.TemporaryDirectory() as folder:
        export(side, vae, direction, example, Path(folder))
        return load(side, Path(folder))


@torch.no_grad()
def export(side: str, vae: Any, direction: str, example: Tensor, folder: Path) -> None:
    """Write what `load` reads."""
    network = Direction(vae, direction).eval()
    with warnings.catch_warnings(
        action="ignore"
    ):  # that shapes and settings become constants, as they should
        if side != "ncnn":
            torch.onnx.export(network, (example,), folder / "model.onnx", dynamo=True, verbose=False)
            return
        torch.jit.trace(network, example, check_trace=False).save(folder / "model.pt")
    import pnnx

    shape = "[" + ",".join(map(str, (1, *example.shape[1:]))) + "]f32"
    command = [pnnx.EXEC_PATH, "model.pt", f"inputshape={shape}", "fp16=0"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if made.returncode:
        said = (made.stderr or made.stdout).strip().splitlines()[-1:]
        raise ValueError(f"ncnn: pnnx could not convert {direction} for inputs of {shape}: {' '.join(said)}")


def load(side: str, folder: Path) -> Runner:
    """What runs the model that `export` has written."""
    readers = {"ONNX Runtime": _onnx_runtime, "OpenVINO": _openvino, "ncnn": _ncnn}
    return readers[side](folder)


def _onnx_runtime(folder: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = str(folder / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(folder: Path) -> Runner:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_MMAP": False,  # the folder goes
    }
    model = openvino.Core().compile_model(str(folder / "model.onnx"), "CPU", settings)
    request = model.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[model.outputs[0]].copy())


def _ncnn(folder: Path) -> Runner:
    import ncnn

    network: Any = ncnn.Net()
    network.opt.num_threads = torch.get_num_threads()
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(network.opt, f"use_{option}", False)
    stem = folder / "model.ncnn"
    if network.load_param(f"{stem}.param") or network.load_model(f"{stem}.bin"):
        raise ValueError(f"ncnn could not load the network that pnnx made ({stem}.param)")

    def run(x: Tensor) -> Tensor:
        results = []
        for image in x:  # it knows no batch
            extractor = network.create_extractor()
            extractor.input("in0", ncnn.Mat(image.contiguous().numpy()).clone())
            results.append(torch.from_numpy(extractor.extract("out0")[1].numpy().copy()))
        return torch.stack(results)

    return run
