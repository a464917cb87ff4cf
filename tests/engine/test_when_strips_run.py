"""When strips run and when diffusers' modules do, with which weights, and what holds if packing or compiling fails."""

import logging

import pytest
import torch
from peft import LoraConfig
from stock_pairs import CONFIGS, differences, pair, whole_and_strips
from torch._inductor.exc import InductorError

from latentcodec.adopt import adopt
from latentcodec.engine.strips import StripPass
from latentcodec.ops import onednn, pointwise
from latentcodec.ops.pointwise import sums


@pytest.fixture
def counted(monkeypatch):
    """A list that grows with every pass in strips."""
    passes = []
    for name in ("encode", "decode"):
        method = getattr(StripPass, name)
        monkeypatch.setattr(
            StripPass, name, lambda *args, method=method, name=name: passes.append(name) or method(*args)
        )
    return passes


def test_strips_run_wherever_no_gradient_is_asked_for(counted):
    _, ours = pair(CONFIGS["sd"])
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        ours(x)
    with torch.inference_mode():
        ours(torch.rand(1, 3, 32, 16))  # of another size, since a second one like the first is recorded
    assert counted == ["encode", "decode"] * 2


def test_results_of_inference_may_be_trained_on():
    _, ours = pair(CONFIGS["sd"])
    with torch.inference_mode():
        x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        z = ours.encoder(x)
    (torch.ones(1, requires_grad=True) * z).sum().backward()


def a_wrapper(ours):
    class Scaled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    block = ours.decoder.mid_block.resnets[0]
    block.conv1 = Scaled(block.conv1)


def float64(ours):
    ours.double()


@pytest.mark.parametrize("change", [a_wrapper, float64])
def test_what_strips_cannot_run_is_left_to_the_modules(change, counted):
    _, ours = pair(CONFIGS["sd"])
    change(ours)
    z = torch.randn(1, 4, 4, 4).to(ours.dtype)
    with torch.no_grad():
        without_gradient = ours.decode(z).sample
    assert torch.equal(without_gradient, ours.decode(z).sample)
    assert counted == []


def test_hooks_on_layers_are_not_lost_by_adopting():
    stock, _ = pair(CONFIGS["sd"])
    stock.decoder.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"mid_block.*first"):
        adopt(stock)


def test_weights_made_in_inference_mode_run_and_an_image_without_a_cell_is_refused():
    with torch.inference_mode():
        _, ours = pair(CONFIGS["sd"])
        assert ours.decode(torch.randn(1, 4, 4, 4)).sample.shape == (1, 3, 32, 32)
        with pytest.raises(ValueError, match="4 x 40 pixels is smaller than one latent cell"):
            ours.encoder(torch.rand(1, 3, 4, 40))


@pytest.mark.parametrize("what", ["gradients", "autocast", "a hook", "an adapter"])
def test_plain_modules_run_where_something_listens(what, counted):
    _, ours = pair(CONFIGS["sd"])
    x, heard = torch.rand(1, 3, 16, 16), []
    if what == "gradients":
        ours(x).sample.sum().backward()
        assert ours.decoder.conv_in.weight.grad is not None
    elif what == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours(x)
    elif what == "a hook":
        for part in (ours.encoder, ours.decoder):
            part.conv_in.register_forward_hook(lambda *_: heard.append(1))
        with torch.no_grad():
            ours(x)
        assert len(heard) == 2
    else:
        with torch.no_grad():
            before = ours(x).sample
            ours.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "conv_in"]))
            assert not torch.equal(ours(x).sample, before)
        counted.clear()
        with torch.no_grad():
            ours(x)
    assert counted == []


def test_a_changed_weight_is_seen():
    """By an optimizer's step, by a write behind autograd's back as adapters do it, by loading, by a cast."""
    reference, ours = pair(CONFIGS["sd"])
    z = torch.randn(1, 4, 4, 4)

    def compare():
        reference.load_state_dict(ours.state_dict())
        with torch.no_grad():
            expected = reference.decoder(z)
            assert (ours.decoder(z) - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())

    compare()
    weights = [ours.decoder.conv_in.weight, ours.decoder.up_blocks[0].upsamplers[0].conv.weight]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    compare()
    for weight in weights:
        weight.data += 0.1
    compare()
    for weight in weights:
        weight.data[:, :, 1, 1] *= 2
    compare()
    other, _ = pair(CONFIGS["sd"])
    ours.load_state_dict(other.state_dict())
    compare()


def test_weights_that_cannot_be_packed_are_used_as_they_are(monkeypatch, caplog):
    def unknown(*_):
        raise AttributeError("no such operator")

    onednn.packs_correctly.cache_clear()
    monkeypatch.setattr(onednn, "packed_convolution", unknown)
    try:
        assert max(differences(*whole_and_strips(CONFIGS["sd"]))) <= 1e-4
        assert "does not pack" in caplog.text
    finally:
        onednn.packs_correctly.cache_clear()


def test_a_compiler_that_fails_leaves_the_functions_as_they_are(monkeypatch, caplog):
    def fail(*_):
        raise InductorError(RuntimeError("Python.h: No such file"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(pointwise, "WORTH_COMPILING", 0)
    compiled = pointwise.compiled_function(sums)
    x, pivot = torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 1, 4)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(compiled(x, pivot), sums(x, pivot))
        assert torch.equal(compiled(x, pivot), sums(x, pivot))
    assert caplog.text.count("Python.h") == 1
