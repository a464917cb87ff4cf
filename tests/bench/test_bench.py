"""The bench pages: what they print, what they write, what they refuse, and that their numbers are right."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.pixels import load_image, save_image
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import evaluate
from latentcodec.report import results as report
from latentcodec.report.build import write_page
from latentcodec.report.crops import worst_window
from latentcodec.report.page import Page
from latentcodec.report.pages.throughput import headline
from latentcodec.report.plots import INK, plot_style
from latentcodec.speed import memory
from latentcodec.speed.operations import fewest_operations
from latentcodec.vae.families import family_of

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import SMALL, small_vae

BENCH = Path(__file__).parents[2] / "bench"
CONFIG = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}
SD_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "in_channels": 3,
}


def script(name: str) -> ModuleType:
    """A bench script as a module: bench/ is not a package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reconstruction() -> ModuleType:
    return script("reconstruction")


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    return script("throughput")


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codecs") / "tiny"
    torch.manual_seed(0)
    LatentCodec(build(CONFIG)).save_pretrained(folder)
    return folder


def save_white(place: Path, side: int = 32) -> tuple[str, str]:
    """A codec whose every picture is white, and a folder of white pictures, which come back unchanged."""
    vae = build(CONFIG)
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(2)
    LatentCodec(vae).save_pretrained(place / "white")
    for i in range(2):
        save_image(torch.ones(3, side, side + i), place / "images" / f"{i}.png")
    return str(place / "white"), str(place / "images")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Five pictures of different sizes, one damaged and one too small."""
    folder = tmp_path / "images"
    for i in range(5):
        noise = torch.nn.functional.avg_pool2d(torch.randn(1, 3, 40 + 3 * i, 44), 5, stride=1)
        save_image(noise.clamp(-1, 1), folder / f"{i}.png")
    save_image(torch.zeros(3, 4, 40), folder / "small.png")
    (folder / "2a_damaged.png").write_bytes((folder / "2.png").read_bytes()[:200])
    return folder


def last_line(text: str) -> dict:
    """Strict JSON: NaN and Infinity are refused."""
    return json.loads(text.strip().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))


def references(page: str) -> list[str]:
    """Everything in a page that a browser would fetch by itself; its own script is looked at in the browser test."""
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r'<a href="[\w.-]+">', "", page)  # to files beside it, followed when they are clicked
    found = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']?([^"'\s>]+)""", page)
    found += re.findall(r"url\(\s*[\"']?([^\"')]+)", page) + re.findall(r"@import\s+(\S+)", page)
    return [target for target in found if not target.startswith(("#", "data:"))]


# --- report


def test_infinite_and_undefined_values_become_null(capsys):
    report.print_last_line({"a": math.inf, "b": [math.nan, {"c": -math.inf}], "d": (1.5, None), "e": "inf"})
    assert last_line(capsys.readouterr().out) == {
        "a": None,
        "b": [None, {"c": None}],
        "d": [1.5, None],
        "e": "inf",
    }


def test_a_page_refers_to_nothing_outside_and_its_plots_share_no_ids():
    page = Page("<title> & more", "lead")
    page.headline([("1 < 2", "a number")])
    page.section("heading", "text")
    page.table(["name", "value"], [["<b>", "1.0"]], "caption", fold="more")
    page.pictures([(torch.zeros(3, 4, 5), "grey"), (torch.zeros(1, 4, 5), "one channel")], "caption")
    for _ in range(2):
        with plot_style():
            figure = Figure()
            axes = figure.subplots()
            axes.scatter([1, 2, 3], [2, 1, 3])
            axes.set_xlabel("a label")
        page.plot(figure, "caption")
    html = page.render()
    assert "a label</text>" in html
    assert references(html) == []
    assert "http" not in html
    assert INK not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 10
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    assert "1 &lt; 2</b>" in html
    assert "<td" in html
    assert "&lt;b&gt;" in html


def test_the_page_test_sees_an_outside_reference():
    assert references('<img src="a.png"><p style="background: url(x.svg)">') == ["a.png", "x.svg"]


def test_columns_are_aligned_numbers_to_the_right(capsys):
    report.print_table(["name", "dB"], [["a", "9.50"], ["longer", "10.25"], ["none", "-"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name       dB", "------  -----", "a        9.50", "longer  10.25", "none        -"]


def test_results_are_named_by_codec_hardware_and_date():
    machine = {"device": "Some CPU @ 2 GHz", "cpu": "Some CPU @ 2 GHz", "cores": 2}
    name = report.stem(["runs/photos/codec"], machine, "throughput")
    assert re.fullmatch(r"photos-codec_some-cpu-2-ghz-2-cores_\d{4}-\d\d-\d\d-\d{6}_throughput", name)
    gpu = machine | {"device": "NVIDIA H200"}
    assert report.stem(["owner/name", "b", "c"], gpu, "x").startswith("owner-name-and-2-more_nvidia-h200_")


def test_a_file_name_that_is_not_utf_8_costs_no_page_and_no_table(tmp_path, capsys):
    name = b"caf\xe9.png".decode(errors="surrogateescape")  # as Linux gives a Latin-1 name to Python
    page = Page("title", "lead")
    page.table(["file"], [[name]], "caption")
    assert r"caf\udce9.png" in page.render()
    report.write_json({"file": name}, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["file"] == name
    report.print_table(["file"], [[name]])
    assert r"caf\udce9.png" in capsys.readouterr().out


# --- reconstruction


def test_reconstruction_measures_what_the_evaluator_measures(
    reconstruction, codec_folder, image_folder, tmp_path, capsys
):
    arguments = ["--codec", str(codec_folder), "--images", str(image_folder), "--out", str(tmp_path / "out")]
    reconstruction.main([*arguments, "--lpips_net", "none"])
    printed = last_line(capsys.readouterr().out)
    images = [load_image(image_folder / f"{i}.png")[0] for i in range(5)]
    expected = evaluate(LatentCodec.from_pretrained(codec_folder), images)
    klt = evaluate(KLT.fit(images, 2, 3), images)
    (entry,) = printed["codecs"]
    for metric in ("psnr", "ssim"):
        low, high = entry[metric].pop("interval")
        assert low <= expected.mean(metric) <= high
        assert entry[metric] == {"mean": expected.mean(metric), "min": min(expected.values(metric))}
        entry[metric]["interval"] = [low, high]
    assert entry["lpips"] == {"mean": None, "max": None, "interval": [None, None]}
    assert entry["klt_psnr"]["mean"] == klt.mean("psnr")
    assert entry["psnr_over_klt"] == expected.mean("psnr") - klt.mean("psnr")
    assert (entry["latent"], entry["floats_per_pixel"]) == ("f2c3", 0.75)

    written = json.loads(Path(printed["files"]["json"]).read_text())
    assert [
        score["psnr"] for score in written["images"][report.short_path(str(codec_folder))]
    ] == expected.values("psnr")
    assert written["codecs"] == printed["codecs"]
    page = Path(printed["files"]["html"]).read_text()
    assert references(page) == []
    assert "http" not in page
    assert [sample["label"].split(":")[0] for sample in written["viewer"]] == ["worst", "median", "best"]
    choices = written["viewer"][0]["choices"]
    assert [choice["label"] for choice in choices[:3]] == ["original", entry["codec"], "KLT f2c3"]
    assert all(written["pictures"][choice["picture"]].startswith("data:image/webp") for choice in choices)
    assert len(entry["round_trips_psnr"]) == 10
    assert entry["round_trips_psnr"][0] == pytest.approx(sum(expected.values("psnr")[:4]) / 4)
    for key in ("commit", "versions", "command", "time", "hardware"):
        assert key in printed
    assert re.fullmatch("[0-9a-f]{64}", entry["fingerprint"])
    assert write_page(written, tmp_path / "out", Path(printed["files"]["html"]).stem).read_text() == page


def test_pictures_of_one_name_in_two_folders_are_told_apart(reconstruction, codec_folder, tmp_path, capsys):
    for folder in "ab":
        save_image(torch.rand(3, 20, 20) * 2 - 1, tmp_path / "images" / folder / "1.png")
    arguments = ["--codec", str(codec_folder), "--images", str(tmp_path / "images"), "--out", str(tmp_path)]
    reconstruction.main([*arguments, "--lpips_net", "none", "--rivals"])
    files = last_line(capsys.readouterr().out)["files"]
    (rows,) = json.loads(Path(files["json"]).read_text())["images"].values()
    assert [row["file"] for row in rows] == ["a/1.png", "b/1.png"]
    page = Path(files["html"]).read_text()
    assert "a/1.png" in page
    assert "b/1.png" in page


def test_pictures_that_come_back_unchanged_have_a_page(
    reconstruction, codec_folder, tmp_path, capsys, monkeypatch
):
    """Their PSNR is infinite, which JSON cannot hold."""
    monkeypatch.setattr(reconstruction, "use_cores", lambda: 1)
    codec, images = save_white(tmp_path)
    arguments = ["--images", images, "--out", str(tmp_path), "--lpips_net", "none"]
    reconstruction.main(["--codec", codec, *arguments])
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[2:7] == ["infinite", "-", "infinite", "-", "1.0000"]
    assert last_line(out)["codecs"][0]["psnr"]["mean"] is None
    page = Path(last_line(out)["files"]["html"]).read_text()
    assert "infinite dB</b>" in page
    assert "from infinite to infinite dB" in page
    assert re.search(r"best: \d.png, infinite dB", page)
    reconstruction.main(["--codec", str(codec_folder), codec, *arguments, "--rivals"])
    page = Path(last_line(capsys.readouterr().out)["files"]["html"]).read_text()
    assert "f2c3: - against the KLT" in page


@pytest.mark.slow
def test_damaged_and_tiny_images_are_skipped_and_listed(
    reconstruction, codec_folder, image_folder, tmp_path, capsys
):
    arguments = ["--codec", str(codec_folder), "--images", str(image_folder), "--out", str(tmp_path / "out")]
    reconstruction.main([*arguments, "--lpips_net", "none"])
    printed = last_line(capsys.readouterr().out)
    assert printed["evaluated"] == 5
    assert [Path(entry["file"]).name for entry in printed["skipped"]] == ["2a_damaged.png", "small.png"]
    assert "4 x 40 pixels" in printed["skipped"][1]["reason"]
    page = Path(printed["files"]["html"]).read_text()
    assert "2a_damaged.png" in page


@pytest.mark.slow
def test_several_codecs_share_a_page_and_the_klt_can_have_its_own_images(
    reconstruction, codec_folder, image_folder, tmp_path, capsys
):
    other = tmp_path / "other"
    LatentCodec(build(CONFIG | {"latent_channels": 2})).save_pretrained(other)
    codecs = ["--codec", str(codec_folder), str(other)]
    folders = [
        "--images",
        str(image_folder),
        "--klt_images",
        str(image_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    reconstruction.main([*codecs, *folders, "--lpips_net", "none"])
    printed = last_line(capsys.readouterr().out)
    assert [entry["latent"] for entry in printed["codecs"]] == ["f2c3", "f2c2"]
    assert printed["codecs"][0]["klt_psnr"]["mean"] > printed["codecs"][1]["klt_psnr"]["mean"]
    assert (
        printed["klt_fitted_on"] == f"6 images of {report.short_path(str(image_folder))}"
    )  # the small one has blocks too


def test_the_window_shown_is_the_one_with_the_largest_error():
    error = torch.zeros(600, 400)
    error[330:350, 100:120] = 1
    rows, columns = worst_window(error, 256)
    assert rows.start <= 330
    assert rows.stop >= 350
    assert columns.start <= 100
    assert columns.stop >= 120
    assert worst_window(torch.zeros(30, 500), 256) == (slice(0, 30), slice(0, 256))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--codec": "nowhere/at/all"}, "nowhere/at/all"),
        ({"--images": "no_such_folder"}, "no_such_folder"),
        ({"--klt_images": "no_such_folder"}, "no_such_folder"),
        ({"--lpips_net": "vgg", "--lpips_weights": "no_such_file"}, "no_such_file"),
        (
            {"--out": str(BENCH / "throughput.py" / "out")},
            r"--out .*throughput.py/out: no results can be wri",
        ),
    ],
)
def test_reconstruction_names_what_it_cannot_open(
    reconstruction, codec_folder, image_folder, tmp_path, monkeypatch, changed, message
):
    given = {"--codec": str(codec_folder), "--images": str(image_folder), "--out": str(tmp_path / "out")}
    arguments = given | {"--lpips_net": "none"} | changed
    monkeypatch.setattr(reconstruction, "measure", lambda *_: pytest.fail("measured before all was opened"))
    with pytest.raises(SystemExit, match=f"^reconstruction.py: .*{message}"):
        reconstruction.main([text for pair in arguments.items() for text in pair])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_earlier_report_and_not_the_table(
    reconstruction, codec_folder, image_folder, tmp_path, capsys, monkeypatch
):
    arguments = ["--codec", str(codec_folder), "--images", str(image_folder), "--out", str(tmp_path / "out")]
    reconstruction.main([*arguments, "--lpips_net", "none"])
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    table = capsys.readouterr().out.splitlines()[:3]

    def full(path, content, durable):
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentcodec.files.write_file", full)
    with pytest.raises(SystemExit, match=r"No space left on device: '.*\.json'"):
        reconstruction.main([*arguments, "--lpips_net", "none"])
    assert capsys.readouterr().out.splitlines()[:3] == table
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_damaged_images_is_refused(reconstruction, codec_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    arguments = ["--codec", str(codec_folder), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"none of the 1 images in .* can be used.*bad\.png"):
        reconstruction.main([*arguments, "--lpips_net", "none"])


# --- what all have


def test_the_document_names_the_benches_that_print_or_write_less_than_the_others():
    paragraph = (BENCH.parent / "docs/measure.md").read_text().split("\n\n")[1]
    sources = {path.stem: path.read_text() for path in BENCH.glob("*.py") if path.stem != "demo"}
    less = {
        name
        for name, text in sources.items()
        if "write_result(" not in text or not re.search(r"print_last_line\(|print\(json.dumps\(", text)
    }
    assert set(re.findall(r"`(\w+)\.py`", paragraph)) == less


# --- pipeline


def test_pictures_that_a_pipeline_cannot_take_are_left_out_and_none_is_an_error(
    tmp_path, capsys, monkeypatch
):
    pipeline = script("pipeline")
    save_image(torch.zeros(3, 300, 200), tmp_path / "narrow.png")
    (tmp_path / "damaged.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"none of the 2 images in {tmp_path} can be used"):
        pipeline._images(str(tmp_path), channels=3)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    assert [re.search(r"(\w+)\.png", line)[1] for line in lines] == ["damaged", "narrow"]
    save_image(torch.zeros(3, 300, 280), tmp_path / "wide.png")
    assert [image.shape for image in pipeline._images(str(tmp_path), channels=3)] == [(1, 3, 256, 256)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(pipeline._images("~", channels=3)) == 1


def test_the_line_of_a_pipeline_that_changes_nothing_is_json(tmp_path, capsys, monkeypatch):
    codec, images = save_white(tmp_path, 32)
    pipeline = script("pipeline")
    monkeypatch.setattr(pipeline, "use_cores", lambda: 1)
    monkeypatch.setattr(pipeline, "SIDE", 32)
    pipeline.main(["--codec", codec, "--images", images, "--out", str(tmp_path / "out")])
    assert last_line(capsys.readouterr().out)["psnr"] is None


# --- throughput


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


@pytest.mark.parametrize("name", ["flux2-small-decoder", "qwen-deep", "wan22"])
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


def test_the_ratio_is_the_median_of_the_ratios_within_the_rounds(throughput):
    measured = {
        "ours": throughput.Measurement([1.0, 2.0, 1.0]),
        "diffusers": throughput.Measurement([3.0, 4.0, 1.0]),  # the machine slowed down in round 2
    }
    case = throughput.Case("decode", "float32", 100, 2)
    record = throughput.record(case, "diffusers", measured, floor=0.5)
    assert record["time_over_ours"] == 2.0
    assert record["ms"] == 3000.0
    assert record["images_per_s"] == pytest.approx(2 / 3)
    assert record["megapixels_per_s"] == pytest.approx(0.02 / 3)
    assert record["floor_ms"] == 500.0


def test_a_side_without_memory_has_no_numbers(throughput):
    measured = {"ours": throughput.Measurement([1.0]), "diffusers": throughput.Measurement()}
    record = throughput.record(throughput.Case("decode", "float32", 64, 1), "diffusers", measured, floor=0.5)
    assert math.isnan(record["ms"])
    assert math.isnan(record["time_over_ours"])


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--codec": "nowhere/at/all"}, "nowhere/at/all"),
        ({"--codec": "missing.json"}, r"missing\.json"),
        ({"--codec": str(BENCH / "throughput.py")}, r"throughput\.py"),
        ({"--sizes": "33"}, "--sizes 33: not a multiple of the codec's 2"),
        ({"--repeats": "0"}, "--repeats"),
        ({"--max_memory": "0"}, "--max_memory 0"),
    ],
)
def test_throughput_names_what_it_cannot_use(throughput, codec_folder, tmp_path, changed, message):
    arguments = {"--codec": str(codec_folder), "--out": str(tmp_path / "out")} | changed
    with pytest.raises(SystemExit, match=f"^throughput.py: .*{message}"):
        throughput.main([text for pair in arguments.items() for text in pair])
    assert not (tmp_path / "out").exists()


def test_too_little_memory_for_ours_is_one_line(throughput, codec_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "use_cores", lambda threads: 1)
    small = ["--sizes", "32", "--batches", "1", "--dtypes", "float32", "--device", "cpu"]
    arguments = ["--codec", str(codec_folder), "--out", str(tmp_path), *small, "--max_memory", "1000"]
    with pytest.raises(SystemExit, match=r"^throughput.py: max_memory 1,000 bytes is too little .* needs"):
        throughput.main(arguments)


def test_a_configuration_file_with_an_unknown_key_is_refused_by_name(throughput, tmp_path):
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(CONFIG | {"latent_chanels": 4}))
    with pytest.raises(SystemExit, match="latent_chanels"):
        throughput.main(["--codec", str(file), "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "headline"),
    [
        (["ours", "diffusers channels_last"], "speed of ours over diffusers channels_last<"),
        (["ours"], "megapixels a second, ours<"),
        (
            ["diffusers channels_last", "diffusers tiled"],
            "megapixels a second, diffusers (channels_last|tiled)<",
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_any_choice_of_sides_is_measured_and_reported(
    throughput, codec_folder, tmp_path, capsys, monkeypatch, sides, headline, dtype
):
    monkeypatch.setattr(throughput, "measure_memory", lambda *_: None)
    monkeypatch.setattr(throughput, "PEAK_SIDE", {"cpu": 64})
    small = ["--sizes", "32", "--batches", "1", "--dtypes", dtype, "--repeats", "1", "--device", "cpu"]
    arguments = ["--codec", str(codec_folder), "--out", str(tmp_path), *small]
    throughput.main([*arguments, "--sides", *sides])
    printed = last_line(capsys.readouterr().out)
    assert [(r["direction"], r["side"]) for r in printed["results"]] == [
        (direction, side) for direction in ("encode", "decode") for side in sides
    ]
    for record in printed["results"]:
        assert (record["time_over_ours"] is None) == ("ours" not in sides)
        assert record["max_error"] < 0.5  # known without "diffusers" among the sides
    assert len(re.findall(headline, Path(printed["files"]["html"]).read_text())) == 2


def test_a_bench_out_of_time_measures_one_round_of_one_case_and_says_what_it_leaves_out(
    throughput, codec_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: pytest.fail("the time was over"))
    monkeypatch.setattr(throughput, "PEAK_SIDE", {"cpu": 64})
    small = ["--sizes", "32", "64", "--batches", "1", "--dtypes", "float32", "--device", "cpu"]
    throughput.main(["--codec", str(codec_folder), "--out", str(tmp_path), *small, "--seconds", "0"])
    said = capsys.readouterr()
    printed = last_line(said.out)
    assert {(r["direction"], r["size"]) for r in printed["results"]} == {("encode", 32)}
    assert printed["rounds"] == 1
    assert said.out.count("left out, since 0 seconds are over") == 3
    assert "memory of ours: not measured" in said.out


@pytest.mark.parametrize(("units", "dtypes"), [(True, ["float32", "bfloat16"]), (False, ["float32"])])
def test_a_number_format_that_is_emulated_is_measured_only_if_asked_for(
    throughput, monkeypatch, capsys, units, dtypes
):
    monkeypatch.setattr(throughput, "is_fast", lambda dtype, device: units or dtype == torch.float32)
    monkeypatch.setattr(throughput, "emulation_cost", lambda dtype, device: 9.0)
    needed = ["--codec", "x", "--out", "y", "--device", "cpu"]
    assert throughput.parse(needed).dtypes == dtypes
    throughput.warn_of_emulation(throughput.parse([*needed, "--dtypes", "bfloat16"]))
    assert ("warning: this machine is not fast in bfloat16" in capsys.readouterr().err) != units


def test_the_headline_names_the_fastest_other_side_and_the_default():
    case = {"direction": "decode", "dtype": "float32", "size": 64, "batch": 1}
    ratios = {"ours": 1.0, "diffusers": 3.0, "diffusers channels_last": 2.0, "diffusers tiled": math.nan}
    records = [{**case, "side": side, "time_over_ours": ratio} for side, ratio in ratios.items()]
    ((number, meaning, level),) = headline(records)
    assert level == "healthy"
    assert number == "2.00x"
    assert meaning.endswith("speed of ours over diffusers channels_last; 3.00x over diffusers as it comes")


@pytest.mark.slow
def test_throughput_runs_as_a_script_and_ends_with_one_line_of_json(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(CONFIG))
    small = ["--sizes", "64", "--batches", "1", "--dtypes", "float32", "--repeats", "2"]
    command = [sys.executable, BENCH / "throughput.py", "--codec", file, "--out", tmp_path / "out", *small]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    printed = last_line(finished.stdout)
    records = {(r["direction"], r["side"]): r for r in printed["results"]}
    assert set(records) == {
        (d, s) for d in ("encode", "decode") for s in ("ours", "diffusers", "diffusers channels_last")
    }
    for record in records.values():
        assert record["ms"] > 0
        assert record["max_error"] < 1e-4
        assert record["floor_ms"] > 0
    assert records["encode", "diffusers"]["max_error"] == 0
    page = Path(printed["files"]["html"]).read_text()
    assert references(page) == []
    assert "http" not in page
    assert len(json.loads(Path(printed["files"]["json"]).read_text())["results"][0]["rounds_ms"]) == 2
