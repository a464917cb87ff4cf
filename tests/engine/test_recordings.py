"""Recorded passes give what the class itself gives: for new inputs, new weights, new settings, and many threads."""

import gc
import subprocess
import threading
import weakref

import pytest
import torch
from stock_pairs import pair
from torch import nn

from latentcodec import optimize_vae, restore_vae
from latentcodec.engine import recordings
from latentcodec.engine.strips import StripPass
from latentcodec.ops.native.build import library
from latentcodec.ops.native.recorder import Recorder

CONFIG = {
    "block_out_channels": (16, 32),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.fixture
def recorded():
    """diffusers' class and ours with the same parameters, the latter with a recording of each network."""
    assert library() is not None  # compiled, if need be
    reference, vae = pair(CONFIG)
    optimize_vae(vae)
    for _ in range(3):
        assert_equal(reference, vae)
    for network in (vae.encoder, vae.decoder):
        assert recordings._known[network].recording is not None
    return reference, vae


@torch.no_grad()
def assert_equal(reference, vae, tolerance=1e-5):
    """On new inputs."""
    x, z = torch.rand(2, 3, 44, 36) * 2 - 1, torch.randn(2, 4, 22, 18)
    for call in (lambda model: model.encode(x).latent_dist.mode(), lambda model: model.decode(z).sample):
        expected = call(reference)
        assert (call(vae) - expected).abs().max() <= tolerance * (expected.max() - expected.min())


def test_a_replay_computes_anew(recorded, monkeypatch):
    monkeypatch.setattr(StripPass, "encode", None)
    monkeypatch.setattr(StripPass, "decode", None)
    assert_equal(*recorded)


def test_a_pass_that_cannot_be_recorded_is_tried_once(monkeypatch):
    """Wide maps take convolutions that are not native: to record every other pass took more time than it saved."""
    reference, vae = pair(CONFIG)
    optimize_vae(vae)
    tried = []

    class Watched(Recorder):
        is_complete = property(lambda _: False, lambda *_: None)

        def __init__(self):
            super().__init__()
            tried.append(self)

    monkeypatch.setattr(recordings, "Recorder", Watched)
    for _ in range(6):
        assert_equal(reference, vae)
    assert len(tried) == 2  # the encoder's and the decoder's


def test_a_warm_call_starts_no_process(recorded, monkeypatch):
    """To ask a compiler for its version takes longer than a small picture."""
    monkeypatch.setattr(subprocess, "Popen", None)
    assert_equal(*recorded)


def by_data(weight):
    weight.data.mul_(1.5)


def in_place(weight):
    with torch.no_grad():
        weight.add_(0.1)


def by_copy(weight):
    weight.data.copy_(torch.randn_like(weight))


def by_numpy(weight):
    weight.detach().numpy()[...] *= 2


def by_new_data(weight):
    weight.data = torch.randn_like(weight)


@pytest.mark.parametrize("change", [by_data, in_place, by_copy, by_numpy, by_new_data])
@pytest.mark.parametrize(
    "name", ["conv_in.weight", "conv_norm_out.weight", "conv_out.bias", "mid_block.resnets.0.conv2.weight"]
)
def test_weights_that_change_count(recorded, change, name):
    reference, vae = recorded
    for part in ("encoder", "decoder"):
        change(getattr(vae, part).get_parameter(name))
    reference.load_state_dict(vae.state_dict())
    for _ in range(3):
        assert_equal(reference, vae)


def test_weights_in_another_object_count(recorded):
    reference, vae = recorded
    for model in (vae, reference):
        torch.manual_seed(1)
        model.decoder.conv_in.weight = nn.Parameter(torch.randn_like(model.decoder.conv_in.weight))
    assert_equal(reference, vae)


@pytest.mark.parametrize(
    ("layer", "attribute", "value"),
    [
        ("conv_in", "padding_mode", "reflect"),
        ("conv_in", "padding_mode", "circular"),
        ("conv_norm_out", "eps", 0.5),
        ("mid_block.resnets.0.norm1", "num_groups", 8),
        ("conv_act", "__class__", nn.GELU),
        ("mid_block.resnets.1.nonlinearity", "__class__", nn.ReLU),
    ],
)
def test_settings_that_change_count(recorded, layer, attribute, value):
    for model in recorded:
        for network in (model.encoder, model.decoder):
            module = network.get_submodule(layer)
            if attribute == "__class__":
                module.__dict__.update(value().__dict__)
            if attribute == "padding_mode":
                module._reversed_padding_repeated_twice = [1, 1, 1, 1]
            setattr(module, attribute, value)
    for _ in range(3):
        assert_equal(*recorded)


def test_another_user_of_the_weights_leaves_the_recording_whole(recorded):
    """Weights are prepared anew for a pass of another kind; those of the recording stay where they are."""
    reference, vae = recorded
    vae.encoder.engine.compiled = vae.decoder.engine.compiled = False
    assert_equal(reference, vae)
    vae.encoder.engine.compiled = vae.decoder.engine.compiled = True
    assert_equal(reference, vae)


def test_many_threads_get_their_own_results(recorded):
    reference, vae = recorded
    inputs = [torch.randn(2, 4, 22, 18) for _ in range(20)]
    with torch.no_grad():
        expected = [reference.decode(z).sample for z in inputs]
    results = [None] * 20

    def run(i):
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(5):
                results[i] = vae.decode(inputs[i]).sample

    threads = [threading.Thread(target=run, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


def test_what_torch_computes_makes_a_recording_useless():
    for compute in (torch.relu, lambda x: x.clone(), lambda x: x.mul_(2), lambda x: x.sum()):
        with Recorder() as recorder:
            compute(torch.empty(3))
        assert not recorder.is_complete
    with Recorder() as recorder:
        torch.empty(4, 2).view(2, 4).permute(1, 0)[1:].unbind(0)
    assert recorder.is_complete


def test_memory_is_used_again_only_when_nobody_holds_it():
    with torch.inference_mode(), Recorder() as recorder:
        first = torch.empty(100)
        view, address = first[50:], first.data_ptr()
        del first
        second = torch.empty(100)
        assert second.data_ptr() != address
        del view
        assert torch.empty(100).data_ptr() == address
    assert recorder.is_complete


def test_a_recording_goes_with_its_network(recorded):
    _, vae = recorded
    encoder = weakref.ref(vae.encoder)
    restore_vae(vae)
    gc.collect()
    assert encoder() is None
