"""A codec inside diffusers' pipelines: it runs there, is saved, and is loaded by people who do not have this package.

Six pipelines are put together from tiny random parts, run, saved, and run again from their folders by one fresh
process in which `latentcodec` cannot be imported.
"""

import json
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from tiny_pipelines import CASES, FLUX, ROUNDING, SIZE, draw, pipeline, stable_diffusion_parts, tiny_vae

from latentcodec import LatentCodec
from latentcodec.adopt import optimize_vae
from latentcodec.engine.plan import STRIP_BYTES, Engine

WITHOUT_LATENTCODEC = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "latentcodec":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
try:
    import latentcodec
except ImportError as error:
    assert str(error) == "blocked: latentcodec"
else:
    raise SystemExit("latentcodec can be imported")

import numpy as np
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    index = json.loads((folder / "pipe" / "model_index.json").read_text())
    absent = {part: None for part, origin in index.items() if origin == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder / "pipe", **absent)
    pipe.set_progress_bar_config(disable=True)
    # Weights mapped from a file begin at any address, and matrix kernels round differently off a 64-byte boundary.
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    inputs = torch.load(folder / "inputs.pt")
    image = pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="np").images
    np.save(folder / "there.npy", image)
    classes = [type(pipe).__name__, type(pipe.vae).__name__, type(pipe.vae.encoder).__module__]
    (folder / "classes.json").write_text(json.dumps(classes))
assert "latentcodec" not in sys.modules
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case run here, saved, and run again by a fresh process without latentcodec."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipelines")
    for name, case in CASES.items():
        (root / name).mkdir()
        pipe, inputs = pipeline(case, root / name), case.inputs()
        np.save(root / name / "strips.npy", draw(pipe, inputs))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "applies", lambda self, network, x: False)
            np.save(root / name / "modules.npy", draw(pipe, inputs))
        torch.save(inputs, root / name / "inputs.pt")
        pipe.save_pretrained(root / name / "pipe")
    command = [sys.executable, "-c", WITHOUT_LATENTCODEC, *(str(root / name) for name in CASES)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: root / name for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_saved_pipeline_draws_the_same_image_where_latentcodec_is_not_installed(name, folders):
    """Run as modules bit for bit, as floats; in strips to the rounding of sums, and to the bit in the 8-bit image."""
    pipeline_class, vae_class, encoder_module = json.loads((folders[name] / "classes.json").read_text())
    assert pipeline_class == CASES[name].pipeline.__name__
    assert vae_class == "AutoencoderKL"
    assert encoder_module.startswith("diffusers.")
    strips, modules, there = (np.load(folders[name] / f"{run}.npy") for run in ("strips", "modules", "there"))
    assert there.shape == (1, SIZE, SIZE, 3)
    assert there.std() > 0.02  # a picture, not a flat colour that any decoder would draw
    assert np.array_equal(modules, there)
    assert np.abs(strips - there).max() < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_saved_pipeline_names_no_class_of_ours(name, folders):
    index = json.loads((folders[name] / "pipe" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    text = "".join(path.read_text() for path in (folders[name] / "pipe").rglob("*.json"))
    assert "latentcodec" not in text


@pytest.mark.parametrize("name", ["text2img", "inpaint"])
def test_tiling_and_slicing_of_a_pipeline_stay_exact(name, tmp_path):
    pipe, inputs = pipeline(CASES[name], tmp_path), CASES[name].inputs() | {"num_images_per_prompt": 2}
    expected = draw(pipe, inputs)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert np.abs(draw(pipe, inputs) - expected).max() < 1e-5
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()
    assert np.array_equal(draw(pipe, inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_an_optimized_pipeline_draws_the_same_image_in_the_thinnest_strips(name, tmp_path, monkeypatch):
    pipe, inputs = pipeline(CASES[name], tmp_path), CASES[name].inputs()
    expected = draw(pipe, inputs)
    optimize_vae(pipe.vae)
    monkeypatch.setitem(STRIP_BYTES, "cpu", 1)
    assert np.abs(draw(pipe, inputs) - expected).max() < ROUNDING


# ---- plugging in


def test_plugging_in_says_what_does_not_fit(tmp_path):
    pipe = pipeline(CASES["text2img"], tmp_path)
    vae = pipe.vae
    with pytest.raises(ValueError, match="16 latent channels, the pipeline's VAE has 4"):
        LatentCodec(tiny_vae(**FLUX)).plug_into(pipe)
    f4 = dict(block_out_channels=[8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 3)
    with pytest.raises(ValueError, match="4 pixels a latent cell, the pipeline's VAE has 8"):
        LatentCodec(tiny_vae(**f4, up_block_types=["UpDecoderBlock2D"] * 3)).plug_into(pipe)
    assert pipe.vae is vae
    pipe.vae = torch.nn.Identity()
    pipe.vae.config = {"z_dim": 16}
    with pytest.raises(ValueError, match="StableDiffusionPipeline works on the latents of Identity"):
        LatentCodec(tiny_vae()).plug_into(pipe)
    pipe.vae = None
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no component 'vae'"):
        LatentCodec(tiny_vae()).plug_into(pipe)


def test_plugging_in_replaces_a_tiny_autoencoder_and_takes_over_its_dtype(tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    pipe = StableDiffusionPipeline(vae=tiny.to(torch.bfloat16), **stable_diffusion_parts(tmp_path))
    codec = LatentCodec(tiny_vae())
    assert codec.plug_into(pipe) is pipe
    assert pipe.vae is codec.vae
    assert codec.dtype == torch.bfloat16


def test_plugging_into_an_offloaded_pipeline_is_refused(tmp_path):
    """The hooks that fetch weights sit in the old VAE; taking its place would leave the new one without."""
    pipe = pipeline(CASES["text2img"], tmp_path)
    accelerate.cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="plug in first, then offload"):
        LatentCodec(tiny_vae()).plug_into(pipe)
