"""The forward pass of training: the posterior's draw, and what gradient checkpointing keeps."""

from dataclasses import replace

import pytest
import torch
from small_runs import small

from latentcodec.training.start.model import TrainedCodec, new_vae


def new_codec(**changes) -> TrainedCodec:
    model = replace(small("unused", "unused").model, **changes)
    return TrainedCodec(new_vae(model, None, None, list), scale=1.0, learn_scale=False)


def test_the_decoder_gets_a_draw_from_the_posterior_and_not_its_mean():
    codec, x, noise = new_codec(), torch.rand(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    result = codec(x, noise, lambda z: z)
    expected = result.mean + torch.exp(result.logvar / 2) * noise
    torch.testing.assert_close(result.latent, expected)
    assert (result.latent - result.mean).abs().mean() > 0.1
    torch.testing.assert_close(result.reconstruction, codec.vae.decode(expected).sample)


def kept_bytes_and_gradients(codec: TrainedCodec) -> tuple[int, list[torch.Tensor]]:
    """What a forward pass keeps for the backward pass, parameters left out, and what that gives."""
    own, kept = {p.data_ptr() for p in codec.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    x, noise = torch.rand(2, 3, 32, 32, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = codec(x, noise, lambda z: z).reconstruction.square().mean()
    loss.backward()
    return sum(kept.values()), [p.grad for p in codec.parameters() if p.grad is not None]


def test_gradient_checkpointing_keeps_far_less_and_gives_the_same_gradients():
    plain, checkpointed = new_codec(), new_codec(gradient_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    for codec in (plain, checkpointed):
        with torch.no_grad():
            for parameter in codec.vae.parameters():  # residual branches start at zero
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    much, expected = kept_bytes_and_gradients(plain)
    little, gradients = kept_bytes_and_gradients(checkpointed)
    assert little < 0.6 * much
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_only_the_named_part_is_trained(part):
    codec = new_codec(part=part, use_quant_conv=True)
    trained = {name.split(".")[0] for name, p in codec.vae.named_parameters() if p.requires_grad}
    assert trained == ({"encoder", "quant_conv"} if part == "encoder" else {"decoder", "post_quant_conv"})
