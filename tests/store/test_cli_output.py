"""What a command prints: progress, counts of one, JSON for programs, escapes where a console lacks characters."""

import json
import re
from io import BytesIO, TextIOWrapper

import pytest
from small_commands import ENCODE
from stores import write_pictures

from latentcodec.cli import main
from latentcodec.cli.output import counting, number_of

pytestmark = pytest.mark.filterwarnings("default")


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


def test_a_console_of_few_characters_gets_escapes(monkeypatch):
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="cp1252", errors="strict"))
    monkeypatch.setattr("latentcodec.cli.run", lambda: print("\u2714 Healthy", flush=True))
    with pytest.raises(SystemExit):
        main()
    assert written.getvalue().splitlines() == [rb"\u2714 Healthy"]
