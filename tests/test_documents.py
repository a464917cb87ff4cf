"""README and docs/ are true: their Python runs, the files and keys that they name exist, and the site builds.

A block of Python runs as it stands, in a folder with a photo.jpg. `<!-- runs with: pipe -->` above it names what the
reader has by then.
"""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from latentcodec import LatentCodec, save_image
from latentcodec.cli import run
from latentcodec.training.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- runs with: (?P<given>[\w, ]+) -->\n)?```python\n(?P<code>.*?)```", re.S)
PATH = re.compile(r"(?<![\w/.-])((?:bench|train|docs|examples|experiments|latentcodec|tests)/[\w./-]+\.\w+)")


def page_ids(page):
    return str(page.relative_to(ROOT))


class Pipe(DiffusionPipeline):
    """What a pipeline is to a codec: it holds a VAE with as many channels as photo-f8c16's, and a factor of 8."""

    def __init__(self):
        super().__init__()
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        self.register_modules(vae=vae.eval())


def store_of_the_photo():
    """A store named latents in the current folder, as the README's command makes it; pictures for one batch of 64."""
    Path("photos").mkdir()
    for number in range(64):
        shutil.copy("photo.jpg", f"photos/{number}.jpg")
    assert run(["encode", "photos", "--codec", "photo-f8c4", "--size", "32", "--out", "latents"]) == 0


@pytest.mark.parametrize(
    ("page", "given", "code"),
    [
        pytest.param(page, block["given"], block["code"], id=f"{page_ids(page)}-{number}")
        for page in PAGES
        for number, block in enumerate(BLOCK.finditer(page.read_text()))
        if block["given"] != "nothing"
    ],
)
def test_python_in_the_documents_runs(page, given, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image(torch.rand(1, 3, 40, 48) * 2 - 1, "photo.jpg")
    known = {"pipe": Pipe, "codec": lambda: LatentCodec(Pipe().vae), "latents": store_of_the_photo}
    names = {name: known[name]() for name in (given or "").replace(" ", "").split(",") if name}
    exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_files_named_in_the_documents_exist(page):
    missing = [
        name for name in PATH.findall(page.read_text()) if not (ROOT / name).exists() and "NAME" not in name
    ]
    assert not missing


def configuration_keys(kind=Config, prefix=""):
    for field in dataclasses.fields(kind):
        yield prefix + field.name
        inner = get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(inner):
            yield from configuration_keys(inner, f"{prefix}{field.name}.")


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_configuration_keys_named_in_the_documents_exist(page):
    keys = set(configuration_keys())
    sections = "|".join(sorted(key for key in keys if any(other.startswith(f"{key}.") for other in keys)))
    named = re.findall(rf"(?:`|--)((?:{sections})\.[a-z_]+(?:\.[a-z_]+)?)\b(?!\()", page.read_text())
    assert not [key for key in named if key not in keys and not key.endswith((".py", ".yaml", ".md"))]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_and_opens_from_disk(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    start = (tmp_path / "index.html").read_text()
    assert 'href="use.html"' in start  # not a folder, which a browser does not open from disk
    assert not re.search(r'(?:src|href)="https?://(?!github|pytorch)[^"]*\.(?:js|css|woff2?)', start)
    assert "<code>train.max_steps</code>" in (tmp_path / "configuration.html").read_text()


def test_every_group_of_messages_has_a_cause_and_a_cure():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    rooms = re.findall(r"^### (\w+)\n\n(?!- )", hooks.messages(), re.M)
    assert rooms == re.findall(r"^### (\w+)\n", hooks.messages(), re.M)
    assert set(rooms) == set(re.findall(r"^## (\w+)\n", (ROOT / "docs/cures.md").read_text(), re.M))
