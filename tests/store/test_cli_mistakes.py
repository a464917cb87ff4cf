"""Mistakes in a command: one line and code 2, and no store is spoiled."""

import pytest
from small_commands import ENCODE, encode_the_photographs

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def store(place):
    return encode_the_photographs(place)


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


def test_a_wrong_option_is_code_2(call):
    assert call("encode", "--nonsense")[0] == 2
    assert call("nonsense")[0] == 2
