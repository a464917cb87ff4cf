"""The verdict of the half-precision certificate: what it needs, at its limits."""

import pytest
import torch
from diffusers import AutoencoderKL

from latentcodec.quality import precision
from latentcodec.quality.precision import Certificate, HalfPrecision

GOOD = HalfPrecision(psnr=60.0, finite=True)


@pytest.mark.parametrize(
    ("largest", "float16", "safe"),
    [
        (8100.0, GOOD, True),  # an eighth of 65504 is 8188
        (8300.0, GOOD, False),
        (60000.0, GOOD, False),  # finite here, but other images may need more
        (100.0, HalfPrecision(psnr=49.0, finite=True), False),
        (100.0, HalfPrecision(psnr=float("nan"), finite=False), False),
    ],
)
def test_float16_is_safe_with_headroom_finite_and_accurate_only(largest, float16, safe):
    certificate = Certificate({"a": (1.0, 2.0), "b": (3.0, largest)}, float16, GOOD, crops=4)
    assert certificate.largest == largest
    assert certificate.float16_is_safe is safe


def test_its_float32_is_exact_on_gpus_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    vae = AutoencoderKL(norm_num_groups=1, block_out_channels=(2,)).eval()
    precisions, copy_of = set(), precision.stock_copy

    def watched(vae, dtype):
        copied = copy_of(vae, dtype)
        for network in (copied.encoder, copied.decoder):
            network.register_forward_pre_hook(
                lambda *given: precisions.add(torch.backends.cudnn.conv.fp32_precision)
            )
        return copied

    monkeypatch.setattr(precision, "stock_copy", watched)
    precision.certify(vae, [torch.rand(3, 8, 8)])
    assert precisions == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
