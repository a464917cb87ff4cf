"""What several tests of the benches share: the bench of speed, and a small codec with random weights."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_scripts import CONFIG, script

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    return script("throughput")


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codecs") / "tiny"
    torch.manual_seed(0)
    LatentCodec(build(CONFIG)).save_pretrained(folder)
    return folder
