"""What every bench prints and writes: tables, one last line of JSON, names of results, pages that fetch nothing."""

import json
import math
import re

import torch
from bench_scripts import BENCH, last_line, references
from matplotlib.figure import Figure

from latentcodec.report import results as report
from latentcodec.report.page import Page
from latentcodec.report.plots import INK, plot_style


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


def test_the_document_names_the_benches_that_print_or_write_less_than_the_others():
    paragraph = (BENCH.parent / "docs/measure.md").read_text().split("\n\n")[1]
    sources = {path.stem: path.read_text() for path in BENCH.glob("*.py") if path.stem != "demo"}
    less = {
        name
        for name, text in sources.items()
        if "write_result(" not in text or not re.search(r"print_last_line\(|print\(json.dumps\(", text)
    }
    assert set(re.findall(r"`(\w+)\.py`", paragraph)) == less
