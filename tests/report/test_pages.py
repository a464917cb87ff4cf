"""Pages: made from their JSON again and again, old results too; what they say, and that they need nothing outside."""

import json
import re
from html import escape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from latentcodec.codec import LatentCodec
from latentcodec.pixels import save_image
from latentcodec.quality import image_codecs
from latentcodec.quality.klt import KLT
from latentcodec.report import __main__ as command
from latentcodec.report import crops, inspection, results
from latentcodec.report.build import build_page, write_result
from latentcodec.report.pages import reconstruction, throughput
from latentcodec.report.pictures import webp
from latentcodec.report.plots import inline_svg, panel, plot_style, series
from latentcodec.report.scales import SCALES, lines

RESULTS = sorted((Path(__file__).parents[2] / "bench/results").glob("*.json"))


def outside(page):
    """What a browser would fetch of a page."""
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r'<a href="[\w.-]+">', "", page)  # to files beside it, followed when they are clicked
    found = re.findall(r"""\s(?:src|href|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    found += re.findall(r"url\(\s*[\"']?([^\"')]+)", page) + re.findall(r"@import\s+(\S+)", page)
    return [target for target in found if not target.startswith(("#", "data:"))]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """A tiny codec of 1 x 1 latents and one of 8 x 8, looked at on drawn pictures in two folders."""
    place = tmp_path_factory.mktemp("inspected")
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        colour = torch.rand(3, 4, 4, generator=generator) * 2 - 1
        image = torch.nn.functional.interpolate(colour[None], size=(16, 16), mode="bilinear")
        save_image(image, place / "images" / ("cats" if number % 2 else "dogs") / f"{number}.png")
    found = {}
    for name, stages in (("point", 5), ("map", 2)):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8,) * stages,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            norm_num_groups=2,
            latent_channels=3,
        )
        codec = LatentCodec(vae)
        looked = inspection.open_images(place / "images", 3, codec.downsampling_factor)
        found[name] = inspection.inspect_codec(codec, f"/somewhere/runs/{name}", place / "images", looked)
    return place, found


def test_pages_of_one_folder_lead_to_each_other_and_to_their_numbers(inspected, tmp_path):
    _, found = inspected
    write_result(found["point"], tmp_path, "one")
    second = Path(write_result(found["map"], tmp_path, "two")["html"]).read_text()
    assert '<a href="two.json">the numbers of this page</a>' in second
    assert '<a href="one.html">one</a>' in second
    command.main([str(tmp_path / "one.json")])  # made again, the first knows the second
    assert '<a href="two.html">two</a>' in (tmp_path / "one.html").read_text()


def test_another_codec_can_be_looked_at_beside_it(inspected):
    place, _ = inspected
    codec = LatentCodec.from_pretrained("photo-f8c4")
    looked = inspection.open_images(place / "images", 3, 8)
    other = LatentCodec.from_pretrained("photo-f8c16")
    data = inspection.inspect_codec(
        codec, "photo-f8c4", place / "images", looked, beside=("photo-f8c16", other)
    )
    choices = [choice["label"] for choice in data["viewer"][0]["choices"]]
    assert choices[:3] == ["original", "codec", "photo-f8c16"]
    pictures = [data["pictures"][choice["picture"]] for choice in data["viewer"][0]["choices"][:3]]
    assert len({*pictures}) == 3
    assert data["beside"]["fingerprint"] == other.fingerprint


def test_where_no_jpeg_is_as_small_as_the_latent_the_smallest_is_shown_and_named():
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    windows = SimpleNamespace(x=x, y=x, mean=torch.zeros(1, 2, 4, 4))  # 32 numbers, 32 bytes
    pictures, samples = inspection._compared(windows, KLT.fit([x[0]], 16, 2), [{"psnr_db": 9.0}], None)
    smallest = image_codecs.code(x, "JPEG", 0)
    assert smallest.quality == 1
    label = samples[0]["choices"][-1]["label"]
    assert label == f"JPEG, {smallest.size / 1024:.1f} KiB, {smallest.size / 32:.1f} x the latent"
    assert pictures[f"0 {label}"] == webp(smallest.image[0])


@pytest.mark.parametrize("name", ["point", "map"])
def test_an_inspection_is_written_and_its_page_made_again_from_the_file(inspected, tmp_path, name):
    _, found = inspected
    files = write_result(found[name], tmp_path, "a")
    page = Path(files["html"]).read_text()
    Path(files["html"]).unlink()
    command.main([files["json"]])
    assert Path(files["html"]).read_text() == page
    assert outside(page) == []
    assert "http" not in re.sub(r"<script>.*?</script>|base64,[^\"']*", "", page, flags=re.DOTALL)
    assert "/somewhere" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"<svg(?! role=\"img\" aria-label=| viewBox=\"[^\"]*\" role=\"img\")", page)


def test_an_inspection_says_all_that_a_reader_needs(inspected):
    _, found = inspected
    point, grid = found["point"], found["map"]
    for data in (point, grid):
        assert data["verdicts"].keys() == {"diffusion", "sampling", "storage"}
        for key in ("commit", "versions", "hardware", "fingerprint", "command", "time"):
            assert key in data
        assert [sample["label"].split(":")[0] for sample in data["viewer"]] == ["worst", "median", "best"]
        assert json.loads(json.dumps(results.finite(data))) == json.loads(
            json.dumps(results.finite(data), allow_nan=False)
        )
    assert point["space"]["label_names"] == ["cats", "dogs"]
    assert "space" not in grid
    assert {strip["name"] for strip in grid["strips"]} == {"channels", "colours", "noise"}
    assert 0 <= grid["measures"]["lnc"] <= 1
    html = build_page(grid).render()
    for word in ("For a diffusion model", "For sampling from N(0, I)", "For storage", "Provisional"):
        assert word in html


def test_a_run_that_was_trained_shows_its_losses(inspected, tmp_path):
    _, found = inspected
    run = tmp_path / "run"
    (run / "codec").mkdir(parents=True)
    steps = [{"step": n, "total": 9.0 - n, "nll": 8.0 - n, "kl": 1.0 + n, "lr": 1e-3} for n in range(5)]
    lines_of_run = [json.dumps(step) for step in [*steps, {"step": 4, "psnr": 20.0, "ssim": 0.5}]]
    (run / "metrics.jsonl").write_text("\n".join(lines_of_run) + "\n")
    (run / "config.yaml").write_text("loss: {kl_weight: 0.5}\n")
    curves = inspection.training_curves(run / "codec")
    assert curves["curves"]["kl"] == [[n, 1.0 + n] for n in range(5)]
    assert curves["curves"]["psnr"] == [[4, 20.0]]
    html = build_page(found["map"] | {"training": curves}).render()
    assert "loss.kl_weight 0.5" in html
    assert "learning rate" in html


def test_a_long_curve_is_medians_of_its_parts_up_to_the_last_step(tmp_path):
    steps = ({"step": n, "kl": float(n)} for n in range(1, 1002))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    curve = inspection.training_curves(tmp_path)["curves"]["kl"]
    assert len(curve) <= inspection.CURVE_POINTS
    assert curve[0] == [4, 2.5]  # steps 1 to 4
    assert curve[-1][0] == 1001


def test_an_image_format_with_more_bits_is_not_drawn_as_one_with_the_same():
    assert crops._label("AVIF", 90, 100) == "AVIF, same bits"
    assert crops._label("JPEG", 250, 100) == "JPEG, 2.5 x the bits"
    rivals = {"JPEG": {"psnr": 20.0, "too_large": 2}, "AVIF": {"psnr": 30.0, "too_large": 0}}
    entry = {"codec": "a", "latent": "f8c4", "floats_per_pixel": 0.0625, "rivals": rivals}
    entry |= {"psnr": {"mean": 29.0}, "klt_psnr": {"mean": 26.0}}
    labels = [line.get_label() for line in reconstruction._rate([entry]).axes[0].lines]
    assert "AVIF" in labels
    assert "JPEG" not in labels


def test_nothing_is_overwritten(inspected, tmp_path):
    _, found = inspected
    first, second = (write_result(found["map"], tmp_path, "a") for _ in range(2))
    assert first["json"] != second["json"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_scale_has_its_limit_its_level_and_known_codecs():
    reason = {"rule": "rough_spectrum", "level": "warning"}
    found = lines(
        {"sec": 0.7},
        {"diffusion": {"reasons": [reason], "notes": []}, "storage": {"reasons": [], "notes": []}},
    )
    (line,) = found
    assert (line["level"], line["text"]) == ("warning", "70%")
    assert line["position"] == pytest.approx(70)
    assert line["zones"][0] == {"start": pytest.approx(45), "width": pytest.approx(55), "level": "warning"}
    assert "white noise" in [mark["label"] for mark in line["marks"]]


def test_a_bundled_codec_on_a_scale_is_named_with_its_date():
    """Its numbers are those of one version, and the name without a date becomes other weights."""
    marks = {label for scale in SCALES.values() for label, _ in scale.marks if label.startswith("photo-")}
    assert marks
    bundled = {path.name for path in (Path(results.__file__).parents[1] / "weights").iterdir()}
    assert marks <= {name for name in bundled if re.search(r"-\d{4}-\d\d-\d\d$", name)}


@pytest.mark.slow
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_of_earlier_versions_render(path, tmp_path):
    command.main([str(path), "--out", str(tmp_path)])
    page = (tmp_path / f"{path.stem}.html").read_text()
    assert outside(page) == []
    assert len(page) < 2 * 2**20


def test_no_bar_passes_the_ceiling_and_nobody_is_praised_for_being_slower():
    record = {
        "direction": "encode",
        "dtype": "float32",
        "size": 64,
        "batch": 1,
        "images_per_s": 1.0,
        "megapixels_per_s": 1.0,
    }
    record |= {
        "floor_ms": 12.0,
        "floor_megapixels_per_s": 0.8,
        "peak_mib": None,
        "rms_error": 0.0,
        "max_error": 0.0,
    }
    slow = record | {"side": "ours", "ms": 20.0, "rounds_ms": [20.0], "time_over_ours": 1.0}
    fast = record | {"side": "diffusers", "ms": 10.0, "rounds_ms": [10.0], "time_over_ours": 0.5}
    clean = throughput.with_ceilings([slow, fast])
    assert [r["floor_ms"] / r["ms"] for r in clean] == pytest.approx([0.5, 1.0])
    ((shown, _, level),) = throughput.headline(clean)
    assert (shown, level) == ("0.50x", "failure")
    assert throughput.tones(clean)[1][4] == "worse"


def test_a_file_that_is_no_result_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SystemExit) as error:
        command.main([str(tmp_path / "a.json")])
    assert error.value.code == 2
    assert "a.json: no result" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no page for results of kind 'x'"):
        build_page({"bench": "x"})


def test_images_are_spread_evenly_however_many_are_taken():
    order = inspection._spread(100)
    assert sorted(order) == list(range(100))
    assert max(b - a for a, b in zip(sorted(order[:10]), sorted(order[:10])[1:], strict=False)) <= 20


HOSTILE = r"a$b$ $\frac{ %d ${x} & <i> \n ' \" _^ {}"


def test_a_dollar_in_a_name_is_a_dollar_in_a_plot():
    """matplotlib would set it as mathematics, or fail on it after everything was measured."""
    with plot_style():
        figure, axes = panel(title=HOSTILE, xlabel=HOSTILE, ylabel=HOSTILE)
        axes.plot([1, 2], [1, 2], label=HOSTILE, **series(0))
        axes.annotate(HOSTILE, (1, 1))
        axes.set_xticks([1, 2], [HOSTILE, HOSTILE])
        axes.legend(title=HOSTILE)
        figure.suptitle(HOSTILE)
    svg = inline_svg(figure, HOSTILE, "p-")
    assert svg.count(">" + escape(HOSTILE, quote=False) + "</text>") == 9
    assert f'aria-label="{escape(HOSTILE)}"' in svg


@pytest.mark.slow
def test_every_page_survives_names_that_mean_something_to_a_plot(inspected, tmp_path):
    _, found = inspected
    for number, data in enumerate((found["map"], results.read_json(RESULTS[-1]))):
        text = json.dumps(results.finite(data))
        for name in ("photo-f8c16", "bench/sd.json", "point", "map"):
            text = text.replace(f'{name}"', f'{json.dumps(HOSTILE)[1:-1]}"')
        page = build_page(json.loads(text)).render()
        assert "<svg" in page, number
