"""The demo as `make demo` runs it, from a copy of what git knows, with its two minutes cut down to seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that a clone has, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clone")
    for name in listed.stdout.decode().split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "no"), ("bfloat16", "bf16")])
def test_the_demo_runs_to_its_page_in_either_number_format(clone, tmp_path, dtype, precision):
    command = [sys.executable, clone / "bench/demo.py", "--out", tmp_path / "demo", "--minutes", "0.05"]
    environment = os.environ | {"LATENTCODEC_DTYPE": dtype, "PYTHONPATH": str(clone)}
    done = subprocess.run(
        [*command, "--seconds", "1"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for step in range(1, 6):
        assert re.search(rf"^\[{step}/5\] .*: about ", done.stdout, re.MULTILINE)
    assert f"training in {dtype} on " in done.stdout
    assert "were not passed" not in done.stderr
    assert (
        done.stdout.splitlines()[-1]
        == f"Open this page in a browser: {(tmp_path / 'demo/demo.html').as_uri()}"
    )
    page = (tmp_path / "demo/demo.html").read_text()
    assert page.count(">original<") == 6
    assert page.count("photo-f8c16: ") == 2 * 6  # under each picture, and for those who cannot see it
    assert "minutes of training</h1>" in page
    config = yaml.safe_load((tmp_path / "demo/config.yaml").read_text())
    assert config["train"]["mixed_precision"] == precision
    speed = json.loads((tmp_path / "demo/throughput.log").read_text().splitlines()[-1])
    assert set(speed["peak_tflops"]) <= {"float32", dtype}


def test_the_page_of_pictures_that_come_back_unchanged(tmp_path, monkeypatch):
    """Their PSNR is infinite, which the last line of a bench writes as null."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "bench/demo.py")
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)  # dataclasses look their module up
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "add_pictures", lambda *_: None)
    entry = {"parameters": 1e6, "psnr": {"mean": None}, "klt_psnr": {"mean": None}}
    machine = dict.fromkeys(("device", "cpu", "torch", "python", "system"), "x") | {"cores": 2, "threads": 2}
    scores = {"hardware": machine | {"cpu_instructions": []}, "codecs": [entry] * 2}
    (tmp_path / "result.json").write_text(json.dumps({"step": 9, "minutes": 2, "psnr": None, "images": 3}))
    for name in demo.REPORTS:
        files = {"html": str(tmp_path / name / "a.html")}
        (tmp_path / f"{name}.log").write_text(json.dumps(scores | {"files": files}))
    demo.main(["--page", "--out", str(tmp_path)])
    assert (tmp_path / "demo.html").read_text().count("infinite dB</b>") == 4


def test_a_step_that_fails_ends_the_demo_with_what_it_said(tmp_path):
    command = [sys.executable, str(ROOT / "bench/demo.py"), "--out", str(tmp_path), "--page"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "result.json" in done.stderr
