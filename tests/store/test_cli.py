"""The command: every verb, from photographs to latents and back; exit codes, JSON lines, errors of one line."""

import json
import re
import shutil
import subprocess
import sys
from io import BytesIO, TextIOWrapper

import numpy as np
import pytest
import torch
import typer
from image_sets import write_bad_files
from safetensors.torch import save_file
from stores import tiny_codec, write_pictures

from latentcodec.cli import app, main, run
from latentcodec.cli.output import DEVICE, counting, number_of
from latentcodec.codec import LatentCodec
from latentcodec.pixels import load_image
from latentcodec.store import encode, prepare
from latentcodec.store.plan import plan_digest

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a codec and photographs."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_codec().save_pretrained(folder / "codec")
    write_pictures(folder / "photos", 5, captions=True)
    return folder


@pytest.fixture
def call(capsys):
    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def last(out):
    return json.loads(out.splitlines()[-1])


ENCODE = ("--workers", 0, "--threads", 1, "--shard-size", 2, "--check", 2)


@pytest.fixture(scope="module")
def store(place):
    arguments = ["encode", place / "photos", "--codec", place / "codec", "--out", place / "store", *ENCODE]
    assert run([str(argument) for argument in arguments]) == 0
    return place / "store"


def test_from_photographs_to_latents_and_back(place, store, call):
    code, out, _ = call("decode", store, "--out", place / "pictures", "--json")
    assert (code, last(out)) == (0, {"items": 5})
    assert load_image(place / "pictures/003.png").shape == (1, 3, 32, 32)
    code, out, _ = call("inspect", store, "--json")
    facts = last(out)
    assert (code, facts["items"], facts["shards"], facts["shapes"]) == (0, 5, 3, {"4x8x8": 5})
    assert "histogram" in out
    assert call("verify", store, "--json")[1].endswith('{"ok": true, "items": 5, "bad_shards": []}\n')


def test_encode_reports_in_json_and_resumes(place, tmp_path, call):
    arguments = (
        "encode",
        place / "photos",
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "store",
        *ENCODE,
        "--json",
    )
    code, out, _ = call(*arguments)
    line = last(out)
    assert code == 0
    keys = {"items", "rejected", "seconds", "images_per_second", "psnr", "bits_per_value", "fingerprint"}
    assert set(line) == keys
    assert (line["items"], line["rejected"], line["bits_per_value"]) == (5, 0, 16.0)
    code, out, _ = call(*arguments)
    assert (code, last(out)["items"]) == (0, 5)


def test_left_out_pictures_end_with_3(place, tmp_path, call):
    photos = write_pictures(tmp_path / "photos", 2)
    bad = write_bad_files(photos)
    arguments = (
        "encode",
        photos,
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "store",
        "--size",
        32,
        *ENCODE,
    )
    code, out, _ = call(*arguments, "--json")
    assert (code, last(out)["rejected"]) == (3, len(bad))
    listed = (tmp_path / "store/rejects.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in listed} == set(map(str, bad))
    code, _, _ = call("finish", tmp_path / "store")
    assert code == 3
    code, _, _ = call(*arguments, "--rank", 0, "--world", 2)  # other ranks would be stopped by another code
    assert code == 0


def test_a_dry_run_writes_nothing(place, tmp_path, call):
    arguments = (
        "encode",
        place / "photos",
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "store",
        "--dry-run",
    )
    code, out, _ = call(*arguments, "--json")
    line = last(out)
    assert (code, line["items"], line["shards"], line["rejected"]) == (0, 5, 1, 0)
    assert line["bytes"] == pytest.approx(5 * 4 * 64 * 2, rel=1)
    assert line["seconds"] >= 0
    assert not (tmp_path / "store").exists()


def test_a_dry_run_counts_what_is_still_to_do(place, store, tmp_path, call):
    arguments = ("encode", place / "photos", "--codec", place / "codec", *ENCODE, "--dry-run", "--json")
    code, out, _ = call(*arguments, "--out", store)
    line = last(out)
    assert (code, line["items"], line["shards"], line["bytes"], line["seconds"]) == (0, 0, 0, 0, 0)
    shutil.copytree(store, tmp_path / "store")
    next((tmp_path / "store").glob("shards/*/000002.arrow")).unlink()
    line = last(call(*arguments, "--out", tmp_path / "store")[1])
    assert (line["items"], line["shards"]) == (1, 1)
    assert line["bytes"] == pytest.approx(4 * 64 * 2, rel=1)
    assert line["seconds"] > 0


def test_a_dry_run_measures_as_the_plan_will_encode(place, tmp_path, call, monkeypatch):
    """In its precision, on its device and with its threads; not with the codec as it was loaded."""
    tried = []

    def encode_batch(codec, pictures, settings):
        tried.append((codec.device.type, codec.dtype, torch.get_num_threads()))
        return {"latent": torch.ones(len(pictures), 4, 8, 8)}

    monkeypatch.setattr("latentcodec.store.estimate.encode_batch", encode_batch)
    arguments = ("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "s", "--dry-run")
    machine = ("--device", "meta", "--precision", "bfloat16", "--threads", 2)
    assert call(*arguments, *machine)[0] == 0
    assert tried == [("meta", torch.bfloat16, 2)] * 2
    assert torch.get_num_threads() == 1


def test_damage_ends_with_3_and_names_the_picture(place, tmp_path, call):
    call("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "store", *ENCODE)
    shard = next((tmp_path / "store").glob("shards/*/000001.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, out, _ = call("verify", tmp_path / "store", "--json")
    assert (code, last(out)["bad_shards"]) == (3, ["shards/4x8x8/000001.arrow"])
    assert str(shard) in out
    (tmp_path / "store/codec/config.json").write_text("{}")
    (tmp_path / "store/plan/0000.arrow").unlink()
    code, out, _ = call("verify", tmp_path / "store")
    assert (code, out.splitlines()[-1].split(", ", 1)[1]) == (3, "damaged: 1 of 3 shards, codec, plan")


def test_drop(place, tmp_path, call):
    call("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "store", *ENCODE)
    code, out, _ = call("finish", tmp_path / "store", "--drop", "001.png", "--drop", "004.png", "--json")
    assert (code, last(out)["items"], last(out)["dropped"]) == (0, 3, 2)


def test_decode_a_file_of_latents(place, tmp_path, call):
    z = torch.randn(2, 4, 8, 8)
    save_file({"latents": z}, tmp_path / "z.safetensors")
    np.save(tmp_path / "one.npy", z[0].numpy())
    for name, count in (("z.safetensors", 2), ("one.npy", 1)):
        code, _, _ = call(
            "decode",
            tmp_path / name,
            "--codec",
            place / "codec",
            "--out",
            tmp_path / name[0],
            "--format",
            "webp",
        )
        assert code == 0
        assert len(list((tmp_path / name[0]).glob("*.webp"))) == count
    code, _, err = call("decode", tmp_path / "one.npy", "--out", tmp_path)
    assert (code, "give --codec" in err) == (2, True)


def test_no_more_latents_are_decoded_than_were_asked_for(place, tmp_path, call, monkeypatch):
    np.save(tmp_path / "z.npy", np.zeros((3, 4, 8, 8), np.float32))
    decoded, written = [], tmp_path / "out"
    decode = LatentCodec.decode

    def watched(codec, z, size=None):
        decoded.append(len(list(written.glob("*"))))  # the pictures that are on the disk by now
        return decode(codec, z, size)

    monkeypatch.setattr(LatentCodec, "decode", watched)
    arguments = ("decode", tmp_path / "z.npy", "--codec", place / "codec", "--out", written, "--first", 2)
    code, out, _ = call(*arguments, "--json")
    assert (code, last(out), decoded) == (0, {"items": 2}, [0, 1])
    assert {path.name for path in written.iterdir()} == {"z-0000.png", "z-0001.png"}


def test_one_is_not_said_in_the_plural(place, tmp_path, call):
    code, out, _ = call(
        *(
            "encode",
            place / "photos/001.png",
            "--codec",
            place / "codec",
            "--out",
            tmp_path / "store",
            *ENCODE,
        )
    )
    assert code == 0
    assert "1 picture encoded" in out
    _, out, _ = call("verify", tmp_path / "store")
    assert "1 picture in 1 shard, intact" in out


def test_reconstruct(place, tmp_path, call):
    code, out, _ = call(
        "reconstruct",
        place / "photos/001.png",
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "a.png",
        "--json",
    )
    assert code == 0
    assert load_image(tmp_path / "a.png").shape == (1, 3, 32, 100)  # three pictures and two lines between
    assert "dB PSNR" in out
    assert set(last(out)) == {"items", "rejected", "psnr", "ssim"}
    code, out, _ = call(
        "reconstruct", place / "photos", "--codec", place / "codec", "--out", tmp_path / "all"
    )
    assert (code, len(list((tmp_path / "all").glob("*.png")))) == (0, 5)


def test_inspect_a_codec(place, call):
    code, out, _ = call("inspect", place / "codec", "--json")
    facts = last(out)
    assert (code, facts["class"], facts["latent"]) == (0, "AutoencoderKL", "[4, H/4, W/4]")
    assert len(facts["fingerprint"]) == 64


def test_the_line_for_programs_is_json_where_a_number_has_no_value(place, tmp_path, call):
    picture = write_pictures(
        tmp_path / "one", 1, sizes=((4, 4),)
    )  # one latent cell: a channel has no deviation
    arguments = ("encode", picture, "--codec", place / "codec", "--out", tmp_path / "store", *ENCODE)
    assert call(*arguments, "--check", 0)[0] == 0
    code, out, _ = call("inspect", tmp_path / "store", "--json")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    facts = json.loads(out.splitlines()[-1], parse_constant=refuse)
    assert (code, facts["channel_std"]) == (0, [None] * 4)


def test_export_and_import(place, store, tmp_path, call):
    code, out, _ = call("export", store, "--to", "parquet", "--out", tmp_path / "parquet", "--json")
    assert (code, last(out)) == (0, {"items": 5, "files": 3})
    np.savez(tmp_path / "a.npz", latents=np.zeros((4, 8, 8), np.float32))
    code, out, _ = call(
        "import",
        tmp_path,
        "--codec",
        place / "codec",
        "--latents",
        "raw",
        "--out",
        tmp_path / "store",
        "--json",
    )
    assert (code, last(out)["items"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("encode", "nowhere", "--codec", "{codec}", "--out", "{new}"), "nowhere: no such file or folder"),
        (("encode", "{photos}", "--codec", "nothing", "--out", "{new}"), "'nothing' is no file"),
        (("encode", "{photos}", "--codec", "{codec}", "--out", "{new}", "--dtype", "int4"), "--dtype int4"),
        (("encode", "{photos}", "--codec", "{codec}", "--out", "{new}", "--engine", "spark"), "local or ray"),
        (
            ("encode", "{photos}", "--codec", "{codec}", "--out", "{store}", "--size", "16"),
            "begun with size None, not 16",
        ),
        (("verify", "{photos}"), "holds no index.json"),
        (
            ("decode", "{store}", "--out", "{new}", "--format", "gif"),
            "--format gif: give png, jpg, jpeg or webp",
        ),
        (("decode", "{photos}/001.png", "--out", "{new}"), "001.png: latents are read from"),
        (
            ("encode", "{photos}", "--codec", "{store}", "--out", "{new}"),
            "no config.json; give {store}/codec",
        ),
        (("decode", "{store}", "--out", "{new}", "--codec", "photo-f8c4"), "made by the codec"),
        (("export", "{store}", "--to", "csv", "--out", "{new}"), "--to csv"),
        (("finish", "{photos}"), "holds no plan"),
        (("inspect", "nothing"), "'nothing' is no file"),
        (("decode", "nowhere", "--out", "{new}"), "nowhere: there is no such store"),
        (("encode", "{photos}", "--codec", "{codec}", "--out", "{photos}/000.png"), "000.png: is a file"),
        (("decode", "{store}", "--out", "{new}", "--device", "cuda:99"), "device cuda:99: PyTorch finds"),
        (
            ("encode", "{photos}", "--codec", "{codec}", "--out", "{new}", "--engine", "ray", "--rank", "0"),
            "--rank 0: leave it out with --engine ray",
        ),
        (
            ("encode", "{photos}", "--codec", "{codec}", "--out", "{new}", "--engine", "ray", "--world", "2"),
            "--world 2: leave it out with --engine ray",
        ),
        (("inspect", "{codec}", "--count", "3"), "--count 3: needs --images"),
        (("inspect", "{store}", "--device", "cpu"), "--device cpu: needs --images"),
        (
            ("reconstruct", "{photos}", "--codec", "{codec}", "--out", "{new}", "--device", "gpu"),
            "device 'gpu'",
        ),
        (
            ("reconstruct", "{photos}/001.png", "--codec", "{codec}", "--out", "{new}.tiff"),
            "new.tiff: a comparison is written as .png",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(place, store, tmp_path, call, arguments, words):
    places = {"photos": place / "photos", "codec": place / "codec", "store": store, "new": tmp_path / "new"}
    code, _, err = call(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert words.format(**places) in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--threads", -1, "--threads -1: at least 1"),
        ("--threads", 0, "--threads 0: at least 1"),
        ("--batch", -3, "--batch -3: at least 0"),
        ("--check", -1, "--check -1: at least 0"),
        ("--min-side", -1, "--min-side -1: at least 0"),
        ("--workers", -1, "--workers -1: at least 0"),
        ("--device", "cuda:99", "device cuda:99: PyTorch finds"),
        ("--device", "foo", "device 'foo': there is no such device"),
        ("--rank", 5, "rank 5 of 2: ranks are 0 to 1"),
        ("--world", 0, "rank 0 of 0: ranks are 0 to -1"),
    ],
)
def test_a_wrong_value_spoils_no_store(place, tmp_path, call, option, value, words):
    arguments = ("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "store", *ENCODE)
    others = ("--world", 2) if option == "--rank" else ("--rank", 0) if option == "--world" else ()
    code, _, err = call(*arguments, *others, option, value)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert call(*arguments)[0] == 0


def test_a_store_begun_on_a_device_that_is_not_here_is_gone_on_with_on_another(
    place, tmp_path, codec_of_plan
):
    store = codec_of_plan(tmp_path / "store", "cuda:99")
    with pytest.raises(ValueError, match=r"store: device cuda:99: PyTorch finds .* \(--device\)"):
        encode(store, workers=0)
    assert encode(store, workers=0, device="cpu").index.items == 5


@pytest.fixture
def codec_of_plan(place):
    """Plans a store as on a machine with such a device."""

    def planned(store, device):
        plan = prepare([str(place / "photos")], store, str(place / "codec"), threads=1, shard_size=2)
        part = plan.parts[0]
        part.machine["device"] = device
        part.about["digest"] = plan_digest({k: v for k, v in part.about.items() if k != "digest"}, part.table)
        next((store / "plan").iterdir()).write_bytes(part.to_bytes())
        return store

    return planned


VERBS_ON_A_DEVICE = {
    "encode": ("encode", "{photos}", "--codec", "{codec}", "--out", "{new}"),
    "decode a store": ("decode", "{store}", "--out", "{new}"),
    "decode a file": ("decode", "{file}", "--codec", "{codec}", "--out", "{new}"),
    "reconstruct": ("reconstruct", "{photos}", "--codec", "{codec}", "--out", "{new}"),
    "inspect": ("inspect", "{codec}", "--images", "{photos}"),
}


@pytest.fixture
def places(place, store, tmp_path):
    """What the names in VERBS_ON_A_DEVICE stand for."""
    np.save(tmp_path / "z.npy", np.zeros((4, 8, 8), np.float32))
    known = {"photos": place / "photos", "codec": place / "codec", "store": store, "file": tmp_path / "z.npy"}
    return known | {"new": tmp_path / "new"}


@pytest.mark.parametrize("verb", VERBS_ON_A_DEVICE)
def test_every_verb_takes_a_gpu_where_there_is_one(places, call, monkeypatch, verb):
    devices = []

    def to(vae, device):
        devices.append(str(device))
        raise ValueError("as far as this machine can go")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    monkeypatch.setattr("latentcodec.store.job.has_triton", lambda: False)
    monkeypatch.setattr("diffusers.AutoencoderKL.to", to)
    monkeypatch.setattr("latentcodec.machine.use_cores", lambda: 1)
    arguments = [argument.format(**places) for argument in VERBS_ON_A_DEVICE[verb]]
    assert call(*arguments)[0] == 2
    assert devices == ["cuda"]
    options = typer.main.get_command(app).commands[arguments[0]].params
    assert [option.help for option in options if option.name == "device"] == [DEVICE]


@pytest.mark.parametrize("verb", VERBS_ON_A_DEVICE)
def test_every_verb_lets_a_codec_on_a_gpu_run_compiled(places, call, monkeypatch, verb):

    def run_compiled(codec):
        raise ValueError("it would run compiled")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    monkeypatch.setattr("diffusers.AutoencoderKL.to", lambda vae, device: vae)
    monkeypatch.setattr("latentcodec.machine.use_cores", lambda: 1)
    monkeypatch.setattr("latentcodec.store.job.has_triton", lambda: True)
    for module in ("codec", "store.encoding"):
        monkeypatch.setattr(f"latentcodec.{module}.run_compiled", run_compiled)
    arguments = [argument.format(**places) for argument in VERBS_ON_A_DEVICE[verb]]
    code, _, err = call(*arguments)
    assert (code, err.splitlines()[-1]) == (2, "error: it would run compiled")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_says_what_is_to_do_and_what_was_left_out(monkeypatch, capsys, is_terminal):
    monkeypatch.setenv("FORCE_COLOR", "1")  # or rich draws no bar where no terminal is
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    monkeypatch.setattr("latentcodec.cli.output.LINE_SECONDS", 0)
    with counting(1200, "picture") as advance:
        advance(9, 1)
        advance(8, 2)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"20 ?(/|of) ?1,?200 pictures", said)
    assert re.search(r"to go, 3 pictures left out", said)
    assert number_of(2, "image pass") == "2 image passes"


def test_a_store_of_nothing_is_said(place, tmp_path, call):
    arguments = ("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "store", *ENCODE)
    code, _, err = call(*arguments, "--min-side", 1000)
    assert code == 3
    assert "nothing was encoded" in err


def test_a_wrong_option_is_code_2(call):
    assert call("encode", "--nonsense")[0] == 2
    assert call("nonsense")[0] == 2


def test_a_console_of_few_characters_gets_escapes(monkeypatch):
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="cp1252", errors="strict"))
    monkeypatch.setattr("latentcodec.cli.run", lambda: print("\u2714 Healthy", flush=True))
    with pytest.raises(SystemExit):
        main()
    assert written.getvalue().splitlines() == [rb"\u2714 Healthy"]


@pytest.mark.slow
def test_the_installed_command(place, tmp_path):
    command = [sys.executable, "-m", "latentcodec"]
    shown = subprocess.run([*command, "encode", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "latentcodec encode photos" in shown.stdout
    assert subprocess.run([*command, "verify", str(place)], capture_output=True).returncode == 2
