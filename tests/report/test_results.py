"""What results and pages need of the machine and of the files beside them."""

import json

import pytest

import latentcodec.report.__main__ as command
from latentcodec.report import results
from latentcodec.report.page import Page


def test_without_git_a_result_has_no_commit(tmp_path, monkeypatch):
    """A container may hold the checkout and not the program; what was measured must not be lost for it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.commit() is None


def test_a_link_leads_to_the_file_whatever_its_name_holds():
    page = Page("a", "b")
    page.links({"report": "folder/run#1 100%\udce9.html"})
    page.link_first({"plain": "photo-f8c16_2026-12-01.html"})
    text = page.render()
    assert 'href="folder/run%231%20100%25%E9.html"' in text
    assert 'href="photo-f8c16_2026-12-01.html"' in text


@pytest.mark.parametrize("kind", ["inspect", "reconstruction", "compare"])
@pytest.mark.parametrize("options", [[], ["--card"], ["--evaluation"]])
def test_a_result_that_lacks_what_its_page_shows_is_one_line_and_code_2(kind, options, tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps({"bench": kind}))
    with pytest.raises(SystemExit) as error:
        command.main([str(tmp_path / "old.json"), *options])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'old.json'}: ")
