"""bench/training.py: what it reads from a run is what the run wrote, and its operations are those of the model."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from small_runs import small, start, train, write_images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentcodec.codec import LatentCodec
from latentcodec.speed.operations import training_operations
from latentcodec.vae.families import family_of

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import SMALL, small_vae

SCRIPT = Path(__file__).parents[2] / "bench/training.py"
ARCHITECTURE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "mid_block_add_attention": False,
}


@pytest.fixture(scope="module")
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PEAK_SIDES, module.PEAK_SECONDS = {"cpu": (64, 96)}, 0.01
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of the real trainer: six steps of two crops."""
    folder = tmp_path_factory.mktemp("runs")
    train(start(small(folder / "run", write_images(folder / "images"))))
    return folder / "run"


def write_run(folder: Path, steps: list[tuple[float, float, float]], **train_settings) -> Path:
    """A run as the trainer leaves it; each step is (seconds, of these waited, minutes of the run so far)."""
    (folder / "codec").mkdir(parents=True)
    (folder / "codec/config.json").write_text(json.dumps(ARCHITECTURE))
    settings = {"batch_size": 4, "accumulation": 2, "mixed_precision": None, **train_settings}
    config = {"model": {"part": "all"}, "data": {"resolution": 32}, "train": settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "step": step,
            "images_per_second": 16 / seconds,
            "step_seconds": seconds,
            "waited_seconds": waited,
            "minutes": minutes,
        }
        for step, (seconds, waited, minutes) in enumerate(steps, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def forward_operations(part: nn.Module, x: torch.Tensor) -> tuple[dict[str, int], torch.Tensor]:
    """2 x multiply-adds of each convolution, counted from the shapes that pass through it; and the output."""
    counts = {}

    def count(name: str, conv: nn.Conv2d, output: torch.Tensor) -> None:
        counts[name] = 2 * output.numel() * conv.weight[0].numel()

    hooks = [
        module.register_forward_hook(lambda conv, _, output, name=name: count(name, conv, output))
        for name, module in part.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        output = part(x)
    for hook in hooks:
        hook.remove()
    return counts, output


@pytest.mark.parametrize("part", ["all", "decoder", "encoder"])
def test_the_operations_are_those_of_every_convolution_forward_and_backward(training, part):
    vae = AutoencoderKL.from_config(ARCHITECTURE)
    encoder, moments = forward_operations(
        nn.Sequential(vae.encoder, vae.quant_conv), torch.zeros(1, 3, 32, 32)
    )
    decoder, _ = forward_operations(nn.Sequential(vae.post_quant_conv, vae.decoder), moments[:, :4])
    # A backward pass costs a forward pass for the input's gradient and another for the weight's. There is no gradient
    # of the image; the encoder alone needs no gradient of the decoder's weights, and quant convs belong to neither.
    first = encoder["0.conv_in"]
    both, quant = sum(encoder.values()) + sum(decoder.values()), encoder["1"]
    expected = {
        "all": 3 * both - first,
        "decoder": both + 2 * sum(decoder.values()) - 2 * decoder["0"] - decoder["1.conv_in"],
        "encoder": both + 2 * sum(encoder.values()) - first - quant + sum(decoder.values()),
    }
    assert training_operations(ARCHITECTURE, 32, part) == expected[part]


@pytest.mark.parametrize(
    "name",
    ["qwen", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux2-small-decoder", "qwen21"))],
)
def test_a_run_of_every_covered_class_is_read(training, name, tmp_path):
    """Diffusers' own class costs as much, with three temporal taps more, since only one of them meets an image."""
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1)])
    vae = small_vae(name)
    LatentCodec(vae).save_pretrained(run / "codec")
    found = training.read(run, None)["operations_per_image"]
    stock = SMALL[name][0](**SMALL[name][1]).to("meta")
    family = family_of(stock)
    middle = (1,) if family.has_frames else ()
    image = torch.empty(1, family.image_channels(stock.config), *middle, 32, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        mean = stock.encode(image).latent_dist.mode()
        stock.decode(mean).sample.sum().backward()
    theirs = counter.get_total_flops()
    assert theirs / 3 < found < theirs if name == "qwen" else found == theirs


def test_speed_and_shares_follow_from_the_steps(training, tmp_path):
    run = training.read(
        write_run(tmp_path / "run", [(2.0, 0.5, 0.05), (1.0, 0.0, 0.1), (4.0, 1.5, 0.2)]), "bfloat16"
    )
    assert run["images_per_s"] == 8  # the median
    assert run["images_per_s_overall"] == pytest.approx(3 * 16 / 12)
    assert run["shares"] == pytest.approx(
        {"computing": 5 / 12, "waiting for data": 2 / 12, "everything else": 5 / 12}
    )
    assert (run["images_per_step"], run["processes"], run["steps"]) == (16, 2, 3)
    assert run["psnr"] is None  # it validated nothing


def test_a_validation_that_loses_nothing_is_no_missing_one(training, tmp_path, monkeypatch, capsys):
    """Held-out pictures that come back unchanged have infinite PSNR, which metrics.jsonl writes as null."""
    monkeypatch.setattr(training, "peak_rate", lambda *_: 1e12)
    run = write_run(tmp_path / "run", [(2.0, 0.5, 0.05), (1.0, 0.0, 0.1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "minutes": 0.05, "psnr": 40.0, "ssim": 0.99, "images": 3}\n')
        file.write('{"step": 2, "minutes": 0.1, "psnr": null, "ssim": 1.0, "images": 3}\n')
    training.main(["--runs", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"])
    *said, last = capsys.readouterr().out.strip().splitlines()
    assert said[2].split()[1] == "infinite"
    page = Path(json.loads(last)["files"]["html"]).read_text()
    assert "infinite dB</b>" in page
    assert "from 40 to 40" in page  # the point that can be drawn


def test_the_precision_of_the_config_counts_before_that_of_the_command_line(training, tmp_path):
    steps = [(1.0, 0.0, 0.1)]
    told = write_run(tmp_path / "told", steps, mixed_precision="bf16")
    untold = write_run(tmp_path / "untold", steps)
    assert training.read(told, "float16")["dtype"] == "bfloat16"
    assert training.read(untold, "float16")["dtype"] == "float16"
    assert training.read(untold, None)["dtype"] == "float32"


def test_a_run_that_is_still_writing_can_be_read(training, tmp_path):
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1), (1.0, 0.0, 0.2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "images_per')
    assert training.read(run, None)["steps"] == 2


def test_the_drift_from_a_teacher_has_no_time_and_is_passed_over(training, tmp_path):
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1), (1.0, 0.0, 0.2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "latent_drift": 0.1, "latent_correlation": 0.99}\n')
    assert training.read(run, None)["minutes"] == pytest.approx(0.2)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    training, tmp_path, monkeypatch
):
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1)])
    monkeypatch.setattr(training, "peak_rate", lambda *_: pytest.fail("measured before --out was tried"))
    with pytest.raises(
        SystemExit, match=r"^training.py: --out .*config\.yaml/out: no results can be written"
    ):
        training.main(["--runs", str(run), "--out", str(run / "config.yaml" / "out")])


def test_a_disk_that_refuses_the_page_is_one_line(training, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1)])

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(training, "peak_rate", lambda *_: 1e12)
    monkeypatch.setattr(training, "write_result", refuse)
    with pytest.raises(SystemExit, match=r"^training.py: disk full"):
        training.main(["--runs", str(run), "--out", str(tmp_path / "out")])


def test_a_run_that_has_no_codec_yet_is_told_when_it_will(training, tmp_path):
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1)])
    (run / "codec/config.json").unlink()
    with pytest.raises(
        SystemExit, match=r"config\.json is missing: the run writes it when it ends or is stopped"
    ):
        training.main(["--runs", str(run), "--out", str(tmp_path / "out")])


def test_a_long_run_is_drawn_with_few_points_and_none_of_its_steps_left_out(training):
    steps = [{"minutes": float(step), "images_per_second": float(step)} for step in range(1001)]
    curve = training.speed_curve(steps)
    assert len(curve) <= training.CURVE_POINTS
    assert curve[-1][0] == 1000
    assert curve[0] == [5.0, 2.5]  # steps 0 to 5


def test_a_run_of_the_trainer_becomes_a_table_a_page_and_a_line_of_json(training, trained, tmp_path, capsys):
    other = write_run(tmp_path / "other", [(1.0, 0.0, 0.1)], mixed_precision="bf16")
    training.main(["--runs", str(trained), str(other), "--out", str(tmp_path / "out"), "--device", "cpu"])
    *said, last = capsys.readouterr().out.strip().splitlines()
    assert said[0].split()[:2] == ["run", "PSNR"]
    data = json.loads(last, parse_constant=lambda name: pytest.fail(name))
    run, bare = data["runs"]
    scores = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in scores if "psnr" in line]
    assert (run["steps"], run["images_per_step"], run["processes"]) == (6, 2, 1)
    assert run["psnr"] == scores[-1]["psnr"]
    assert run["share_of_peak"] == pytest.approx(
        run["images_per_s"] * run["operations_per_image"] / data["peak_tflops"]["float32"] / 1e12
    )
    assert math.isclose(sum(run["shares"].values()), 1)
    assert bare["psnr"] is None
    curves = json.loads(Path(data["files"]["json"]).read_text())["runs"][0]["loss_curves"]
    assert {"nll", "kl", "lr", "total", "psnr"} <= curves.keys()
    assert [point[0] for point in curves["kl"]] == [1, 2, 3, 4, 5, 6]
    page = Path(data["files"]["html"]).read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:|[\w.-]+\.json["'])""", page)
    assert "http" not in page
    written = json.loads(Path(data["files"]["json"]).read_text())["runs"][0]
    assert written["psnr_curve"] == [[line["minutes"], line["psnr"]] for line in scores]


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "codec/config.json"])
def test_a_folder_that_is_no_run_is_refused_by_the_name_of_what_it_lacks(training, tmp_path, missing):
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1)])
    (run / missing).unlink()
    with pytest.raises(SystemExit, match=re.escape(str(run / missing))):
        training.main(["--runs", str(run), "--out", str(tmp_path / "out")])


def test_a_run_without_a_step_is_refused(training, tmp_path):
    with pytest.raises(SystemExit, match=r"metrics\.jsonl: no step"):
        training.main(["--runs", str(write_run(tmp_path / "run", [])), "--out", str(tmp_path / "out")])


def test_a_peak_below_what_the_run_did_is_pointed_out(training, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", [(1.0, 0.0, 0.1)])
    command = ["--runs", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for peak, pointed_out in (1.0, True), (1e15, False):
        monkeypatch.setattr(training, "peak_rate", lambda dtype, device, peak=peak: peak)
        training.main(command)
        assert ("the machine is busier" in capsys.readouterr().out) == pointed_out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", b"[1]\n"),
        ("metrics.jsonl", b'{"images_per_second": 1}\n'),
        ("metrics.jsonl", b"\xff\xfe\n\n"),
        ("metrics.jsonl", b'{"images_per_second": "x", "step_seconds": null}\n'),
        ("config.yaml", b"[1, 2]"),
        ("config.yaml", b"{"),
        ("config.yaml", b"train: 1\ndata: 2\nmodel: 3\n"),
        ("codec/config.json", b"{"),
        ("codec/config.json", b"[]"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line_that_names_it(file, content, training, tmp_path):
    folder = write_run(tmp_path / "run", [(1.0, 0.1, 1.0)] * 3)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        training.read(folder, None)
    assert "\n" not in str(caught.value)
