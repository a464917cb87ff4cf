"""Weights are packed for the shapes they are used with: a warm pass reorders none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from latentcodec.ops import onednn

WARM_PASS = """
import sys, torch
from latentcodec.adopt import build, optimize_vae
dtype = getattr(torch, sys.argv[1])
vae = optimize_vae(build({"block_out_channels": (32, 160), "norm_num_groups": 8, "mid_block_add_attention": False,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2})).to(dtype).eval()
x, z = torch.rand(1, 3, 136, 120, dtype=dtype), torch.randn(1, 4, 68, 60, dtype=dtype)
def networks():
    with torch.no_grad():
        vae.encoder(x), vae.decoder(z)
networks()
print("warm", flush=True)
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
    networks()
"""
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"CXX": ""}, id="no compiler"),
        pytest.param(AVX2, id="AVX2"),
    ],
)
def test_a_warm_pass_reorders_no_weight(dtype, setting):
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", WARM_PASS, dtype],
        env=os.environ | setting | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.split("warm")[1].splitlines()
    calls = [line.split(",")[5] for line in lines if ",exec,cpu," in line]
    assert "convolution" in calls, run.stdout
    assert calls.count("reorder") == 0


def test_shapes_share_a_layout_and_are_not_kept_for_ever():
    weight = torch.randn(48, 32, 3, 3).to(memory_format=torch.channels_last)
    packed = onednn._PackedWeight(
        torch.ops.mkldnn._reorder_convolution_weight, weight, ([0, 1], [1, 1], [1, 1], 1)
    )
    made = [packed[torch.Size((1, 32, rows, 40))] for rows in range(4, 40)]
    assert len(packed.by_shape) <= onednn.SHAPES
    assert len({id(weight) for weight in made}) < len(made)


@pytest.mark.parametrize("rows", [3, 7, 18])
def test_every_shape_equals_torch(rows):
    weight = torch.randn(48, 32, 3, 3).to(memory_format=torch.channels_last)
    run, x, bias = onednn.packed_convolution(weight, 1, 1), torch.randn(2, rows, 11, 32), torch.randn(48)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 1, (0, 1)).permute(0, 2, 3, 1)
    torch.testing.assert_close(run(x, bias, None), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(x, bias, expected), 2 * expected, rtol=1e-4, atol=1e-4)
