"""Every covered class, adopted and optimised, gives diffusers' own numbers: images, batches, clips, and back again."""

import copy
import pickle

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderOutput
from peft import LoraConfig
from small_vaes import CAUSAL_NAMES, SMALL, images_for, relative_error, results, small_vae

from latentcodec.adopt import adopt, build, optimize_vae, restore_vae
from latentcodec.engine import plan
from latentcodec.ops import convolutions
from latentcodec.vae.families import FAMILIES


@pytest.mark.parametrize("name", SMALL)
def test_an_adopted_vae_gives_the_numbers_of_its_class_and_is_restored(name):
    vae = small_vae(name)
    keys = list(vae.state_dict())
    x, z = images_for(vae)
    before = results(vae, x, z)
    assert optimize_vae(vae) is vae
    assert type(vae) is SMALL[name][0]
    assert list(vae.state_dict()) == keys
    for actual, expected in zip(results(vae, x, z), before, strict=True):
        assert relative_error(actual, expected) <= 1e-5
    restore_vae(vae)
    assert all(map(torch.equal, results(vae, x, z), before))


@pytest.mark.parametrize(
    "name", [name if name in ("kl", "qwen") else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_half_precision_errs_no_more_than_the_class(name):
    squares = torch.zeros(2)
    for seed in range(3):
        torch.manual_seed(seed)
        stock = small_vae(name).type(torch.bfloat16)
        exact, ours = copy.deepcopy(stock).float(), adopt(copy.deepcopy(stock))
        x, z = (value.bfloat16() for value in images_for(stock, height=6, width=5))
        expected = results(exact, x.float(), z.float())
        for side, vae in enumerate((ours, stock)):
            for actual, right in zip(results(vae, x, z), expected, strict=True):
                squares[side] += (actual.float() - right).square().mean() / right.var()
    assert squares[0] <= 1.02 * squares[1]


@pytest.mark.parametrize("name", ["qwen", "wan21", "wan22"])
@pytest.mark.parametrize("frames", [5, 6, 9])
def test_clips_run_on_the_class_before_and_after_single_images(name, frames):
    vae = small_vae(name)
    clip, latents = images_for(vae, batch=1, frames=frames)
    latents = latents[:, :, :3]
    expected = results(vae, clip, latents)
    image = images_for(vae, batch=1)
    alone = results(vae, *image)
    optimize_vae(vae)
    for _ in range(2):
        assert all(map(torch.equal, results(vae, clip, latents), expected))
        for actual, right in zip(results(vae, *image), alone, strict=True):
            assert relative_error(actual, right) <= 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_tiling_is_exact_whatever_the_tile_sizes_are_set_to(name):
    vae = small_vae(name)
    x, z = images_for(vae, batch=1, height=10, width=12)
    expected = results(vae, x, z)
    adopt(vae)
    vae.enable_tiling()
    for key in vars(vae):
        if key.startswith("tile_sample") and key != "tile_overlap_factor":
            setattr(vae, key, 32)
    if hasattr(vae, "tile_latent_min_size"):
        vae.tile_latent_min_size = 4
    for actual, right in zip(results(vae, x, z), expected, strict=True):
        assert relative_error(actual, right) <= 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_a_copied_and_a_pickled_vae_are_their_own(name):
    vae = optimize_vae(small_vae(name))
    x, z = images_for(vae)
    expected = results(vae, x, z)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.add_(1)
            assert all(map(torch.equal, results(other, x, z), expected))
            for parameter in vae.parameters():
                parameter.sub_(1)


@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_what_users_add_to_layers_counts(name):
    """Hooks and adapters are respected: the class's own code runs."""
    vae = adopt(small_vae(name))
    x, z = images_for(vae)
    seen = []
    handle = vae.decoder.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    plain = results(vae, x, z)[1]
    assert seen
    handle.remove()
    assert relative_error(results(vae, x, z)[1], plain) <= 1e-5
    with torch.no_grad():
        vae.decoder.mid_block.resnets[0].conv2.weight.mul_(2)
    assert relative_error(results(vae, x, z)[1], plain) > 1e-3


def test_an_adapter_on_flux2_changes_its_images():
    vae = adopt(small_vae("flux2"))
    x, z = images_for(vae)
    before = results(vae, x, z)[1]
    vae.add_adapter(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False))
    assert relative_error(results(vae, x, z)[1], before) > 1e-3


@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_gradients_flow_through_an_adopted_vae(name):
    vae = small_vae(name)
    x, _ = images_for(vae)
    gradients = []
    for _ in range(2):
        vae.zero_grad()
        vae.encode(x).latent_dist.parameters.square().mean().backward()
        gradients.append([p.grad.clone() for p in vae.encoder.parameters() if p.grad is not None])
        adopt(vae)
    largest = max(gradient.abs().max() for gradient in gradients[0])
    assert len(gradients[0]) == len(gradients[1]) > 10
    pairs = zip(*gradients, strict=True)
    assert all((ours - theirs).abs().max() <= 1e-5 * largest for theirs, ours in pairs)


@pytest.mark.parametrize("method", ["_encode", "_decode"])
@pytest.mark.parametrize("name", ["qwen", "wan21"])
def test_a_derived_class_that_encodes_or_decodes_in_its_own_way_goes_on_so(name, method):
    kind = SMALL[name][0]

    class Derived(kind):
        """Of a user."""

    def halved(self, x, **settings):
        result = getattr(kind, method)(self, x, **settings)
        return result / 2 if method == "_encode" else DecoderOutput(sample=result.sample / 2)

    setattr(Derived, method, halved)
    vae = small_vae(name)
    vae.__class__ = Derived
    x, z = images_for(vae)
    expected = results(vae, x, z)
    for way in (optimize_vae, restore_vae):
        for actual, right in zip(results(way(vae), x, z), expected, strict=True):
            assert relative_error(actual, right) <= 1e-5


def test_an_uncovered_class_is_refused_with_those_that_are_covered():
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    for way in (adopt, optimize_vae, restore_vae):
        with pytest.raises(
            TypeError, match=f"AutoencoderTiny is not covered; covered are {', '.join(FAMILIES)}"
        ):
            way(tiny)
    with pytest.raises(ValueError, match="attn_scales"):
        build(SMALL["qwen"][1] | dict(attn_scales=[0.5]), "AutoencoderKLQwenImage")


def test_a_first_image_does_not_wait_for_the_compiler(monkeypatch):
    """As long as the native functions are being compiled torch's run, in the convolutions too."""
    vae = small_vae("qwen")
    x = torch.rand(1, 3, 1, 32, 24) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mode()
        monkeypatch.setattr(plan, "library_if_built", lambda: None)
        monkeypatch.setattr(convolutions, "library", lambda: pytest.fail("waits for the compiler"))
        actual = optimize_vae(vae).encode(x).latent_dist.mode()
    assert relative_error(actual, expected) <= 1e-5
