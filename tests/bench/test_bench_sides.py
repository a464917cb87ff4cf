"""What the bench of speed compares: the same work with the same weights on every side, and its operations."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from bench_scripts import CONFIG, last_line
from torch.utils.flop_counter import FlopCounterMode

from latentcodec.codec import LatentCodec
from latentcodec.speed import memory
from latentcodec.speed.operations import fewest_operations
from latentcodec.vae.families import family_of

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import SMALL, small_vae

SD_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "in_channels": 3,
}


@pytest.mark.parametrize(("direction", "billions"), [("encode", 558.3), ("decode", 1064.0)])
def test_operations_are_those_counted_by_hand_for_stable_diffusion(throughput, direction, billions):
    operations = fewest_operations(SD_CONFIG, throughput.Case(direction, "float32", 512, 1))
    assert operations / 2e9 == pytest.approx(billions, abs=0.05)
    doubled = fewest_operations(SD_CONFIG, throughput.Case(direction, "float32", 512, 2))
    assert doubled == 2 * operations


@pytest.mark.parametrize("name", SMALL)
def test_operations_are_those_of_diffusers_own_class_without_the_needless_taps(throughput, name):
    """An image meets one of three temporal taps, a doubled map four of nine."""
    kind, config = SMALL[name]
    with torch.device("meta"):
        vae = kind(**config)
    needless = []

    def note(layer: str, conv: torch.nn.Module, output: torch.Tensor) -> None:
        share = 1.0 / (conv.weight.shape[2] if conv.weight.ndim == 5 else 1)
        share *= 4 / 9 if "upsample" in layer else 1
        needless.append(2 * output.numel() * conv.weight[0].numel() * (1 - share))

    for layer, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.register_forward_hook(lambda conv, _, output, layer=layer: note(layer, conv, output))
    for direction in ("encode", "decode"):
        case = throughput.Case(direction, "float32", 64, 2)
        value = torch.empty(case.shape(family_of(vae), vae.config), device="meta")
        needless.clear()
        with FlopCounterMode(display=False) as counter:
            throughput.call(vae, direction, value)
        expected = counter.get_total_flops() - sum(needless)
        assert fewest_operations(vae.config, case, kind.__name__) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "name",
    ["qwen-deep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux2-small-decoder", "wan22"))],
)
def test_every_covered_class_is_measured(throughput, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "use_cores", lambda threads: 1)
    monkeypatch.setattr(throughput, "PEAK_SIDE", {"cpu": 64})
    LatentCodec(small_vae(name)).save_pretrained(tmp_path / "codec")
    small = ["--sizes", "32", "--batches", "2", "--dtypes", "float32", "--repeats", "1", "--device", "cpu"]
    arguments = ["--codec", str(tmp_path / "codec"), "--out", str(tmp_path), *small]
    throughput.main([*arguments, "--no_memory"])
    records = last_line(capsys.readouterr().out)["results"]
    assert len(records) == 2 * 3
    assert all(record["max_error"] < 1e-4 for record in records)
    assert all(record["time_over_ours"] > 0 for record in records)
    if name != "flux2-small-decoder":
        with pytest.raises(SystemExit, match=r"--sides diffusers compiled: not for AutoencoderKL\w+, whose"):
            throughput.main([*arguments, "--sides", "diffusers compiled"])


@pytest.mark.parametrize("name", ["flux2-small-decoder", "wan22"])
def test_a_configuration_file_may_be_of_any_covered_class(throughput, name, tmp_path):
    kind, config = SMALL[name]
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(config | {"_class_name": kind.__name__}))
    setup = throughput.Setup(str(file), "cpu", None)
    assert type(setup.codec("float32").vae) is type(setup.vae("diffusers", "float32")) is kind
    vae = setup.codec("float32").vae
    images = memory.inputs(family_of(vae), vae.config, throughput.Case("encode", "float32", 32, 2))
    assert images.shape == (2, 3, 32, 32)


def test_all_sides_hold_the_same_weights_and_ours_equals_diffusers(throughput, codec_folder):
    setup = throughput.Setup(str(codec_folder), "cpu", None)
    x = throughput.example(throughput.Case("encode", "float32", 32, 2), setup.vae("diffusers", "float32"))
    assert x.shape == (2, 3, 32, 32)
    outputs = [
        throughput.call(setup.vae(side, "float32"), "encode", x)
        for side in ("ours", "diffusers", "diffusers channels_last")
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-4, atol=1e-5)
    best = setup.vae("diffusers channels_last", "bfloat16").encoder.conv_in.weight
    assert best.is_contiguous(memory_format=torch.channels_last)
    assert best.dtype == torch.bfloat16
    assert setup.vae("diffusers", "float32").encoder.conv_in.weight.is_contiguous()


def test_the_example_to_decode_has_the_latent_shape_of_its_size(throughput, codec_folder):
    reference = throughput.Setup(str(codec_folder), "cpu", None).vae("diffusers", "float32")
    z = throughput.example(throughput.Case("decode", "float32", 64, 2), reference)
    assert z.shape == (2, 3, 32, 32)
    assert throughput.call(reference, "decode", z).shape == (2, 3, 64, 64)


def test_a_configuration_file_gives_the_same_random_weights_in_every_process(throughput, tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(CONFIG))
    setup = throughput.Setup(str(file), "cpu", None)
    first, second = (setup.vae(side, "float32").state_dict() for side in ("ours", "diffusers"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.slow
def test_peak_memory_counts_the_activations_and_not_the_weights(throughput, codec_folder):
    setup = throughput.Setup(str(codec_folder), "cpu", None)
    cases = [throughput.Case("decode", "float32", size, 1) for size in (256, 512)]
    (small, _), (large, whole) = memory.in_a_fresh_process(setup, "diffusers", cases)
    assert whole > large  # by the weights
    if math.isnan(small):
        pytest.skip("this system does not tell the peak of a process")
    activation = 8 * 512 * 512 * 4  # bytes of a map of 8 channels; the widest has 16, and its layer holds two
    assert 4 * activation <= large <= 10 * activation
    assert small < large / 2
