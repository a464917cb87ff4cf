"""What follows single operations gets those of diffusers' class, and no pass in strips.

Transforms of torch.func, tracers, dispatch modes, fake tensors and subclasses of tensors.
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
from stock_pairs import CONFIGS, X, Z, close, pair
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from latentcodec import optimize_vae


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
