"""On mounted file systems that refuse one operation each, everything is written as on a disk of Linux.

They are mounted in user space (`refusing_folder.py`); a machine that cannot mount skips, and `test_files.py` tries the
same refusals by substitution.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from latentcodec import LatentCodec, files, load_image, save_image
from latentcodec.adopt import build
from latentcodec.files import append_file, write_files, write_new, write_whole
from latentcodec.training import checkpoint as checkpoints
from latentcodec.training.export.codec_folder import write_codec

HABITS = {
    "a disk": [],
    "no flush of folders": ["fsync_folder=EINVAL"],
    "no flush": ["fsync=ENOSYS", "fsync_folder=ENOSYS"],
    "no permissions": ["chmod=EPERM"],
    "no rename of folders": ["rename_folder=ENOSYS"],
    "no rename of folders, as across devices": ["rename_folder=EXDEV"],
    "no rename": ["rename_folder=EPERM", "rename_file=EPERM"],
    "no replacing": ["replace=EEXIST"],
    "no appending": ["append=EPERM"],
    "no links": ["link=EPERM"],
    "no locks": ["lock=ENOLCK"],
    "a bucket": [
        *("fsync_folder=EINVAL", "chmod=EPERM", "rename_folder=ENOSYS", "rename_file=ENOSYS"),
        *("link=ENOTSUP", "lock=ENOSYS", "append=EPERM"),
    ],
}
pytestmark = pytest.mark.filterwarnings("ignore::latentcodec.files.FileSystemWarning")


@pytest.fixture(params=HABITS)
def folder(request, tmp_path):
    """An empty folder on a file system with the habit."""
    pytest.importorskip("mfusepy", reason="no file systems in user space", exc_type=(ImportError, OSError))
    behind, mounted = tmp_path / "behind", tmp_path / "mounted"
    behind.mkdir()
    mounted.mkdir()
    script = Path(__file__).with_name("refusing_folder.py")
    with subprocess.Popen(
        [sys.executable, script, behind, mounted, *HABITS[request.param]], stderr=subprocess.PIPE
    ) as server:
        until = time.monotonic() + 20
        while not os.path.ismount(mounted):
            if server.poll() is not None or time.monotonic() > until:
                server.kill()
                pytest.skip("this machine mounts no file system in user space")
            time.sleep(0.02)
        files._said.clear()
        yield mounted
        subprocess.run(["umount", "-l", mounted], check=True)
        server.kill()  # a test that failed may still hold files open


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tiny_vae():
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return build({"block_out_channels": [4, 4], "norm_num_groups": 2, "latent_channels": 2, **blocks})


def test_everything_is_written_and_read_back_and_no_litter_stays(folder):
    write_whole(folder / "a", b"1")
    write_whole(folder / "a", b"2")
    assert (folder / "a").read_bytes() == b"2"
    assert write_new(folder / "b", b"3")
    assert not write_new(folder / "b", b"4")
    assert (folder / "b").read_bytes() == b"3"
    append_file(folder / "b", b"4")
    append_file(folder / "b", b"5")
    assert (folder / "b").read_bytes() == b"345"
    write_files(folder / "c", {"x": b"5", "y": b"6"}, last="y")
    write_files(folder / "c", {"x": b"7", "y": b"8"}, last="y")
    assert [(folder / "c" / name).read_bytes() for name in "xy"] == [b"7", b"8"]
    picture = torch.rand(1, 3, 8, 8).round() * 2 - 1
    save_image(picture, folder / "d.png")
    assert torch.equal(load_image(folder / "d.png"), picture)
    assert names(folder) == ["a", "b", "c", "d.png"]
    assert names(folder / "c") == ["x", "y"]


def test_a_codec_is_saved_replaced_and_loaded(folder):
    for seed in (0, 1):
        torch.manual_seed(seed)
        codec = LatentCodec(tiny_vae())
        codec.save_pretrained(folder / "saved")
        write_codec(codec, folder / "codec", "a card")
        for place in ("saved", "codec"):
            loaded = LatentCodec.from_pretrained(folder / place).vae.state_dict()
            assert all(torch.equal(value, loaded[name]) for name, value in codec.vae.state_dict().items())
    assert names(folder) == ["codec", "saved"]
    assert names(folder / "codec") == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]


def test_checkpoints_are_committed_pruned_and_found(folder):
    checkpoints.prepare(folder / "checkpoints")
    for step in range(4):
        checkpoints.save(
            folder / "checkpoints",
            step,
            tensors={"model": {"weight": torch.full((3,), float(step))}},
            objects={"optimizer": {"step": step}},
            state={"draw": step},
            keep_last=2,
        )
    found = checkpoints.newest(folder / "checkpoints")
    assert found.step == 3
    assert found.tensors("model")["weight"].tolist() == [3.0] * 3
    assert names(folder / "checkpoints") == ["step-00000002", "step-00000003"]
