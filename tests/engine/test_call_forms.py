"""However diffusers' own networks can be called, they give the same numbers after adopting, or say why not.

Arguments by position and by name, block by block, under transforms of torch.func and tracers, with tensor subclasses.
"""

import copy
import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from safetensors.torch import save
from stock_pairs import CONFIGS, pair
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from latentcodec import LatentCodec, optimize_vae, restore_vae
from latentcodec.adopt import adopt
from latentcodec.engine.plan import Engine
from latentcodec.engine.strips import StripPass

X, Z = (2, 3, 48, 32), (2, 4, 6, 4)


def block_by_block(decoder, z, temb):
    """A forward pass as people write it anew after diffusers' pattern."""
    z = decoder.mid_block(decoder.conv_in(z), temb)
    for block in decoder.up_blocks:
        z = block(z, temb)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(z)))


def down_by_down(encoder, x):
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        x = block(x)
    return encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(x))))


CALLS = {
    "encode(x)": lambda vae, x, z: vae.encode(x).latent_dist.parameters,
    "encode(x, return_dict=False)": lambda vae, x, z: vae.encode(x, return_dict=False)[0].parameters,
    "decode(z)": lambda vae, x, z: vae.decode(z).sample,
    "decode(z, return_dict=False)": lambda vae, x, z: vae.decode(z, return_dict=False)[0],
    "vae(x)": lambda vae, x, z: vae(x).sample,
    "vae(sample=x)": lambda vae, x, z: vae(sample=x, sample_posterior=False).sample,
    "encoder(x)": lambda vae, x, z: vae.encoder(x),
    "encoder(sample=x)": lambda vae, x, z: vae.encoder(sample=x),
    "decoder(z)": lambda vae, x, z: vae.decoder(z),
    "decoder(z, None)": lambda vae, x, z: vae.decoder(z, None),
    "decoder(sample=z, latent_embeds=None)": lambda vae, x, z: vae.decoder(sample=z, latent_embeds=None),
    "down blocks": lambda vae, x, z: down_by_down(vae.encoder, x),
    "up blocks with temb None": lambda vae, x, z: block_by_block(vae.decoder, z, None),
    "up blocks with a temb": lambda vae, x, z: block_by_block(vae.decoder, z, torch.full((1, 1, 1, 1), 0.5)),
    "mid_block with a temb for each channel": lambda vae, x, z: (
        vae.decoder.mid_block(  # a norm hides a constant
            vae.decoder.conv_in(z), torch.linspace(-1, 1, vae.config.block_out_channels[-1])[:, None, None]
        )
    ),
    "mid_block(hidden_states=, temb=)": lambda vae, x, z: vae.decoder.mid_block(
        hidden_states=vae.decoder.conv_in(z), temb=None
    ),
    "up_block(hidden_states=, temb=)": lambda vae, x, z: vae.decoder.up_blocks[0](
        hidden_states=vae.decoder.conv_in(z), temb=None
    ),
    "down_block(hidden_states=)": lambda vae, x, z: vae.encoder.down_blocks[0](
        hidden_states=vae.encoder.conv_in(x)
    ),
    "resnet(input_tensor=, temb=)": lambda vae, x, z: vae.decoder.mid_block.resnets[0](
        input_tensor=vae.decoder.conv_in(z), temb=None
    ),
    "attention(h, temb=)": lambda vae, x, z: vae.decoder.mid_block.attentions[0](
        vae.decoder.conv_in(z), temb=None
    ),
    "attention(hidden_states=)": lambda vae, x, z: vae.decoder.mid_block.attentions[0](
        hidden_states=vae.decoder.conv_in(z)
    ),
    "downsampler(hidden_states=)": lambda vae, x, z: vae.encoder.down_blocks[0].downsamplers[0](
        hidden_states=vae.encoder.down_blocks[0].resnets[0](vae.encoder.conv_in(x), None)
    ),
    "upsampler(h, output_size)": lambda vae, x, z: vae.decoder.up_blocks[0].upsamplers[0](
        vae.decoder.conv_in(z), (13, 9)
    ),
    "upsampler(hidden_states=)": lambda vae, x, z: vae.decoder.up_blocks[0].upsamplers[0](
        hidden_states=vae.decoder.conv_in(z)
    ),
}


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * (theirs.max() - theirs.min())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(torch.contiguous_format, id="nchw"),
        pytest.param(torch.channels_last, id="nhwc", marks=pytest.mark.slow),
    ],
)
def vaes(request):
    torch.manual_seed(0)
    return [vae.to(memory_format=request.param) for vae in pair(CONFIGS["sd"])]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_diffusers_gives_its_numbers(vaes, name, grad):
    x, z = torch.rand(X) * 2 - 1, torch.randn(Z)
    with torch.set_grad_enabled(grad):
        theirs, ours = (CALLS[name](vae, x, z) for vae in vaes)
    close(ours.detach(), theirs.detach())


def test_an_image_on_another_device_than_the_vae_is_left_to_torch(vaes):
    """Which says that they are apart; the engine would read one device's addresses on the other."""
    ours, x = copy.deepcopy(vaes[1]), torch.rand(X)
    with torch.no_grad():
        assert ours.encoder.engine.applies(ours.encoder, x)
        assert not ours.encoder.engine.applies(ours.to("meta").encoder, x)


def test_latent_embeds_are_refused_as_the_class_refuses_them(vaes):
    for vae, error in zip(vaes, (TypeError, ValueError), strict=True):
        with torch.no_grad(), pytest.raises(error):
            vae.decoder(torch.randn(Z), torch.zeros(1, 1, 1, 1))


# ---- what follows single operations


@pytest.fixture
def strips(monkeypatch):
    """Counts the passes that run in strips."""
    passes = []
    for name in ("encode", "decode"):
        method = getattr(StripPass, name)
        monkeypatch.setattr(StripPass, name, lambda *args, m=method: passes.append(1) or m(*args))
    return passes


def dual(function, z):
    with forward_mode.dual_level():
        return forward_mode.unpack_dual(function(forward_mode.make_dual(z, torch.ones_like(z)))).tangent


TRANSFORMS = {
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[1],
    "vmap": lambda f, z: torch.vmap(lambda a: f(a[None])[0])(z),
    "dual numbers": dual,
    "vjp": lambda f, z: (lambda y, pull: pull(torch.ones_like(y))[0])(*torch.func.vjp(f, z)),
    "make_fx": lambda f, z: make_fx(f)(torch.zeros_like(z))(z),
    "make_fx, symbolic": lambda f, z: make_fx(f, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        torch.zeros(2, 4, 8, 8)
    )(z),
    "jit.trace": lambda f, z: torch.jit.trace(f, torch.zeros_like(z), check_trace=False)(z),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("make_fx") else name
        for name in TRANSFORMS
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_give_the_numbers_of_diffusers(vaes, name, grad, strips):
    if name in ("jvp", "dual numbers", "vmap"):  # for which torch's attention has no rule on CPUs
        vaes = pair(CONFIGS["sd"] | {"mid_block_add_attention": False})
        vaes[1].to(memory_format=torch.channels_last)
    z = torch.randn(Z).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad):
        theirs, ours = (TRANSFORMS[name](vae.decoder, z) for vae in vaes)
    close(ours.detach(), theirs.detach())
    assert not strips


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_for_other_sizes(vaes):
    """A trace of strips would have the sizes, and packed weights, of the image that it was made with."""
    reference, vae = vaes
    with torch.no_grad():
        traced = torch.jit.trace(vae.decoder, torch.randn(1, 4, 4, 4), check_trace=False)
        z = torch.randn(1, 4, 10, 6)
        close(traced(z), reference.decoder(z))
        assert "mkldnn" not in str(traced.inlined_graph)


class Convolutions(TorchDispatchMode):
    """How many convolutions are seen one by one, as counters of operations and debuggers see them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **kwargs or {})


def test_who_watches_single_operations_sees_those_of_the_class():
    stock, ours = pair(CONFIGS["sd"])
    optimize_vae(ours)
    counts = []
    for vae in (stock, ours):
        with torch.no_grad(), Convolutions() as seen:
            vae.decode(torch.randn(*Z))
        counts.append(seen.count)
    assert counts[1] == counts[0] > 0


def test_fake_tensors_tell_the_shape(vaes, strips):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert vaes[1].decode(mode.from_tensor(torch.empty(Z))).sample.shape == (2, 3, 48, 32)
    assert not strips


class Logged(torch.Tensor):
    """A tensor subclass that counts what is done with it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("where", ["image", "weight"])
def test_subclasses_of_tensors_keep_their_own_operations(where, strips):
    reference, vae = pair(CONFIGS["sd"])
    x = torch.rand(X)
    given = x.as_subclass(Logged) if where == "image" else x
    if where == "weight":
        conv = vae.encoder.conv_in
        conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Logged), requires_grad=False)
    before = Logged.calls
    with torch.no_grad():
        ours = vae.encoder(given)
        close(ours.as_subclass(torch.Tensor), reference.encoder(x))
    assert Logged.calls > before
    assert not strips


# ---- layers that were changed


def circular(self, x, weight, bias):
    return nn.functional.conv2d(nn.functional.pad(x, (1,) * 4, mode="circular"), weight, bias, self.stride)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("change", ["circular", "reflect", "replicate", "_conv_forward", "forward"])
def test_other_paddings_and_replaced_convolutions_are_obeyed(change, grad):
    """Also in channels_last, on maps that training's fused functions are for."""
    results = []
    for vae in pair(CONFIGS["sd"]):
        vae.to(memory_format=torch.channels_last)
        for layer in vae.decoder.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                if change == "_conv_forward":
                    layer._conv_forward = circular.__get__(layer)
                elif change == "forward":
                    layer.forward = lambda x, layer=layer: circular(layer, x, layer.weight, layer.bias)
                else:
                    layer.padding_mode = change
                    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
        torch.manual_seed(1)
        z = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(grad):
            results.append(vae.decoder(z).detach())
    close(results[1], results[0])


@pytest.mark.parametrize("name", ["_conv_forward", "forward"])
def test_a_class_of_torch_whose_code_was_replaced_is_obeyed(name, monkeypatch, strips):
    reference, vae = pair(CONFIGS["sd"])
    original = getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda self, *args: 2 * original(self, *args))
    with torch.no_grad():
        close(vae.decoder(torch.ones(Z)), reference.decoder(torch.ones(Z)))
    assert not strips


@pytest.mark.parametrize(
    ("kind", "name"),
    [(nn.Conv2d, "_conv_forward"), (nn.Conv2d, "forward"), (nn.GroupNorm, "forward"), (nn.SiLU, "forward")],
)
@pytest.mark.parametrize("grad", [False, True])
def test_replaced_code_that_copies_the_name_of_its_module_is_obeyed(kind, name, grad, monkeypatch, strips):
    sides = pair(CONFIGS["sd"])
    original = getattr(kind, name)

    @functools.wraps(original)
    def scaled(self, *args):
        return 1.5 * original(self, *args)

    z = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
    for side in sides:
        side.to(memory_format=torch.channels_last)
    monkeypatch.setattr(kind, name, scaled)
    with torch.set_grad_enabled(grad):
        theirs, ours = (side.decoder(z).detach() for side in sides)
    close(ours, theirs)
    assert not strips


def test_hooks_on_all_modules_change_results_with_gradients():
    sides = [side.to(memory_format=torch.channels_last) for side in pair(CONFIGS["sd"])]
    z = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, y: 1.5 * y if isinstance(module, nn.GroupNorm) else None
    )
    try:
        theirs, ours = (side.decoder(z).detach() for side in sides)
    finally:
        handle.remove()
    close(ours, theirs)


def test_hooks_on_all_modules_are_heard(strips):
    _, vae = pair(CONFIGS["sd"])
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module)))
    try:
        with torch.no_grad():
            vae.decoder(torch.randn(Z))
    finally:
        handle.remove()
    assert nn.GroupNorm in heard
    assert not strips


def test_backward_hooks_on_a_norm_are_heard():
    _, vae = pair(CONFIGS["sd"])
    vae.to(memory_format=torch.channels_last)
    heard = []
    vae.decoder.up_blocks[0].resnets[0].norm1.register_full_backward_hook(lambda *_: heard.append(1))
    vae.decoder(torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)).sum().backward()
    assert heard


# ---- results that libraries take


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_results_can_be_saved_and_viewed(batch, layout):
    vae = optimize_vae(AutoencoderKL(**CONFIGS["flux"]).eval())
    vae.to(memory_format=layout)
    with torch.no_grad():
        z = vae.encode(torch.rand(batch, 3, 64, 96)).latent_dist
        image = vae.decode(z.mode()).sample
    for value in (image, z.parameters, *((z.mode(), z.sample() * 0.18) if batch == 1 else ())):
        save({"value": value})
        value.view(batch, -1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_results_of_a_codec_can_be_saved_and_viewed(layout):
    codec = LatentCodec(pair(CONFIGS["sd"])[0])
    codec.vae.to(memory_format=layout)
    x = torch.rand(2, 3, 61, 90)
    z = codec.encode(x)
    for value in (z, z[0], codec.decode(z), codec.decode(z, size=(61, 90))):
        save({"value": value})
        value.view(len(value), -1)


# ---- attention processors


def test_processors_are_listed_and_changed_as_in_diffusers(vaes):
    reference, vae = (copy.deepcopy(side) for side in vaes)
    assert list(vae.attn_processors) == list(reference.attn_processors)
    assert all(type(p) is AttnProcessor2_0 for p in vae.attn_processors.values())
    for change in (
        lambda v: v.set_attn_processor(AttnProcessor()),
        lambda v: v.set_attn_processor({name: SlicedAttnProcessor(1) for name in v.attn_processors}),
        lambda v: v.set_default_attn_processor(),
    ):
        for side in (reference, vae):
            change(side)
        types = [[type(p) for p in side.attn_processors.values()] for side in (reference, vae)]
        assert types[0] == types[1]
        with torch.no_grad():
            close(vae.decoder(torch.ones(Z)), reference.decoder(torch.ones(Z)))


class Doubled(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_a_processor_of_ones_own_is_refused_in_words_and_works_after_restoring():
    reference, vae = pair(CONFIGS["sd"])
    with pytest.raises(ValueError, match=r"cannot compute by a Doubled.*restore_vae"):
        vae.set_attn_processor(Doubled())
    restore_vae(vae).set_attn_processor(Doubled())
    reference.set_attn_processor(Doubled())
    with torch.no_grad():
        close(vae.decoder(torch.ones(Z)), reference.decoder(torch.ones(Z)))
    with pytest.raises(ValueError, match="cannot compute by a Doubled"):
        adopt(vae)


def test_the_engine_runs_where_nothing_speaks_against_it(vaes, strips):
    with torch.no_grad():
        vaes[1].decode(torch.randn(Z))
    assert strips
    assert isinstance(vaes[1].decoder.engine, Engine)
