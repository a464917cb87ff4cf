"""Whatever torch's defaults and modes are around a call, and whatever comes in, the result is diffusers' own."""

from contextlib import contextmanager

import pytest
import torch
from stock_pairs import config, pair
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from latentcodec import LatentCodec, optimize_vae
from latentcodec.ops.native.build import library

CONFIG = config(
    channels=(16, 32),
    groups=4,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
X, Z = (2, 3, 44, 36), (2, 4, 22, 18)


@pytest.fixture
def sides():
    """diffusers' class and ours, which replays a recording from the third call on."""
    assert library() is not None
    reference, vae = pair(CONFIG)
    return reference, optimize_vae(vae)


def calls(vae, x, z):
    return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


def assert_equal(sides, x, z):
    with torch.no_grad():
        for theirs, ours in zip(*(calls(side, x, z) for side in sides), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            assert not ours.numel() or (ours - theirs).abs().max() <= 2e-5 * (theirs.max() - theirs.min())


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device():
    torch.set_default_device("meta")  # stands for a GPU: memory that a CPU cannot read
    try:
        yield
    finally:
        torch.set_default_device(None)


class Doubling(TorchFunctionMode):
    """Whoever looks at functions sees those of the plain layers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        return result * 2 if function is nn.functional.conv2d else result


@pytest.mark.parametrize("around", [default_dtype, default_device, lambda: torch.device("meta"), Doubling])
def test_defaults_and_modes_of_torch_change_nothing(sides, around):
    inputs = [(torch.rand(X) * 2 - 1, torch.randn(Z)) for _ in range(4)]
    with around():
        for x, z in inputs:
            assert_equal(sides, x, z)
    assert_equal(sides, *inputs[0])


@pytest.mark.parametrize("around", [default_dtype, default_device])
def test_a_codec_works_whatever_the_defaults_are(sides, around):
    codec, x = LatentCodec(sides[1]), torch.rand(X)
    expected = codec.decode(codec.encode(x))
    with around():
        assert torch.equal(codec.decode(codec.encode(x)), expected)


def test_results_of_every_call_can_be_edited_and_trained_on(sides):
    x, z = torch.rand(X), torch.randn(Z)
    for _ in range(4):
        with torch.no_grad():
            results = calls(sides[1], x, z)
        for result in results:
            scale = nn.Parameter(torch.ones(1))
            (result * scale).sum().backward()
            result.mul_(0)
    assert_equal(sides, x, z)


def test_reentrant_checkpoints_have_gradients(sides):
    gradients = []
    for side in sides:
        for seed in range(4):
            torch.manual_seed(seed)
            z = torch.randn(Z, requires_grad=True)
            checkpoint(lambda z, side=side: side.decode(z).sample, z, use_reentrant=True).sum().backward()
        gradients.append(z.grad)
    assert (gradients[1] - gradients[0]).abs().max() <= 1e-3 * gradients[0].abs().max()


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_batch_is_no_error(sides, count):
    assert_equal(sides, torch.rand(count, *X[1:]), torch.randn(count, *Z[1:]))


@pytest.mark.parametrize("channels", [2, 5, 16])
def test_another_number_of_channels_is_torchs_own_error(sides, channels):
    """Not a picture of memory beside the image."""
    for _ in range(3):
        with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
            sides[1].encode(torch.rand(2, channels, 44, 36))
        with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
            sides[1].decode(torch.rand(2, channels, 22, 18))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_input_of_another_dtype_is_torchs_own_error(sides, dtype):
    """Not a sum over twice the memory that the weights have."""
    for side in sides:
        for weights, given in ((dtype, torch.float32), (torch.float32, dtype)):
            nn.Module.to(side, weights)
            for _ in range(3):
                with torch.no_grad(), pytest.raises(RuntimeError, match="should be the same"):
                    side.encode(torch.rand(X, dtype=given))
                with torch.no_grad(), pytest.raises(RuntimeError, match="should be the same"):
                    side.decode(torch.rand(Z, dtype=given))


def test_weights_of_several_dtypes_are_not_recorded(sides):
    """A sum over a recording's weights reads values of four bytes."""
    network, z = sides[1].decoder, torch.randn(Z)
    stages = [(22 << i, 18 << i, stage) for i, stage in enumerate(network.up_blocks)]
    assert network.engine._is_recordable(network, z, stages)
    nn.Module.to(network.conv_out, torch.bfloat16)
    assert not network.engine._is_recordable(network, z, stages)


def test_an_empty_batch_has_empty_gradients(sides):
    for side in sides:
        x = torch.empty(0, 32, 22, 18).to(memory_format=torch.channels_last).requires_grad_()
        side.decoder.up_blocks[0](x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
