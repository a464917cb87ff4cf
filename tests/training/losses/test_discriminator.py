"""The adversarial loss: hinges by hand, gradients that stay apart, two halves equal to the whole, the
alarm."""

import pytest
import torch
from torch import Tensor, nn

from latentcodec.training.losses import discriminator as adversarial
from latentcodec.training.losses.discriminator import DiscriminatorConfig, DiscriminatorHealth, PatchGAN


def tiny() -> PatchGAN:
    return PatchGAN(image_channels=3, channels=8, layers=2)


@pytest.mark.parametrize(("layers", "patch"), [(2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_a_patch_of_the_documented_size(layers: int, patch: int) -> None:
    network = PatchGAN(1, channels=2, layers=layers)
    for module in list(network.modules()):
        if isinstance(module, nn.GroupNorm):  # its statistics see the whole image; the convolutions do not
            module.forward = lambda x: x
    side = 2 * patch  # room for the patch of a logit in the middle
    x = torch.randn(1, 1, side, side, requires_grad=True)
    rows = side // 2**layers - 2
    middle = network(x).view(rows, rows)[rows // 2, rows // 2]
    (gradient,) = torch.autograd.grad(middle, x)
    seen = (gradient[0, 0] != 0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [patch, patch]


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_any_image_channels_give_a_logit_per_patch(channels: int) -> None:
    assert PatchGAN(channels, 8, 3)(torch.randn(2, channels, 64, 48)).shape == (2, 6 * 4)


def test_the_smallest_image_gives_one_logit_and_a_smaller_one_an_error() -> None:
    network = PatchGAN(3, 8, 3)
    assert network(torch.randn(2, 3, 24, 24)).shape == (2, 1)
    with pytest.raises(ValueError, match=r"24 pixels.*16 x 64.*discriminator.layers"):
        network(torch.randn(2, 3, 16, 64))


def test_the_logits_of_an_image_do_not_depend_on_the_batch_and_nothing_is_kept() -> None:
    network = tiny()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]))
    assert not list(network.buffers())


def test_hinge_values_are_those_computed_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[-2.0, 0.0, 1.0]])
    assert adversarial.hinge_loss(real, fake).tolist() == [[0.0, 0.75, 2.0]]


class Sum(nn.Module):
    """A discriminator whose logit is known: a scaled sum of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1).sum(1, keepdim=True)


def test_the_losses_and_the_accuracy_follow_the_logits() -> None:
    x, y = torch.tensor([0.25, -0.1]).view(2, 1, 1, 1), torch.tensor([-1.0, -0.25]).view(2, 1, 1, 1)
    out = adversarial.discriminator_losses(Sum(), x, y)  # logits: real 0.5, -0.2; fake -2, -0.5
    torch.testing.assert_close(out["d_loss"], torch.tensor([0.25, 0.85]))
    assert out["d_accuracy"].tolist() == [1.0, 0.5]
    torch.testing.assert_close(out["d_logit_real"], torch.tensor([0.5, -0.2]))
    torch.testing.assert_close(out["d_logit_fake"], torch.tensor([-2.0, -0.5]))
    torch.testing.assert_close(adversarial.generator_loss(Sum(), y), torch.tensor([2.0, 0.5]))


def test_the_generators_backward_leaves_no_gradient_in_the_discriminator() -> None:
    network, y = tiny(), torch.randn(2, 3, 32, 32, requires_grad=True)
    adversarial.generator_loss(network, y).mean().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
    assert all(p.requires_grad for p in network.parameters())


def test_the_discriminators_backward_leaves_no_gradient_in_the_generator() -> None:
    network, decoder = tiny(), nn.Conv2d(3, 3, 1)
    y = decoder(torch.randn(2, 3, 32, 32))
    adversarial.discriminator_losses(network, torch.randn(2, 3, 32, 32), y)["d_loss"].mean().backward()
    assert all(p.grad is None for p in decoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_frozen_restores_each_parameter_as_it_was_even_after_an_error() -> None:
    network = tiny()
    kept = next(network.parameters()).requires_grad_(False)
    with adversarial.frozen(network):
        assert not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="pixels a side"), adversarial.frozen(network):
        network(torch.randn(1, 3, 2, 2))
    assert [p for p in network.parameters() if not p.requires_grad] == [kept]


def test_both_gradients_of_two_halves_of_a_batch_average_to_those_of_the_whole() -> None:
    network, x, y = tiny().double(), torch.randn(4, 3, 32, 32).double(), torch.randn(4, 3, 32, 32).double()

    def gradients(rows: slice) -> list[Tensor]:
        loss = adversarial.discriminator_losses(network, x[rows], y[rows])["d_loss"].mean()
        return list(torch.autograd.grad(loss, list(network.parameters())))

    halves = zip(gradients(slice(0, 2)), gradients(slice(2, 4)), strict=True)
    for half, whole in zip(halves, gradients(slice(0, 4)), strict=True):
        torch.testing.assert_close((half[0] + half[1]) / 2, whole)


def test_the_adaptive_weight_makes_both_gradients_equal_at_the_last_layer() -> None:
    layer = nn.Conv2d(4, 3, 3)
    y = layer(torch.randn(2, 4, 8, 8))
    terms = y.square().mean(), 50 * y.sin().mean()
    first, second = (torch.autograd.grad(t, list(layer.parameters()), retain_graph=True) for t in terms)
    weight = adversarial.adaptive_weight(first, second)
    assert not weight.requires_grad

    def norm(gradients: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([g.flatten() for g in gradients]).norm()

    torch.testing.assert_close(weight * norm(second), norm(first), rtol=1e-3, atol=0)
    assert adversarial.adaptive_weight([torch.ones(9)], [torch.zeros(9)]).item() == 1e4


def test_a_discriminator_learns_to_tell_two_kinds_of_images_apart() -> None:
    network = tiny()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(40):
        x = torch.rand(4, 3, 32, 32) * 2 - 1
        out = adversarial.discriminator_losses(network, x, nn.functional.avg_pool2d(x, 3, 1, 1))
        optimizer.zero_grad()
        out["d_loss"].mean().backward()
        optimizer.step()
    assert out["d_accuracy"].mean() > 0.95


def run(health: DiscriminatorHealth, steps: int, *values: float) -> DiscriminatorHealth:
    for _ in range(steps):
        health = health.updated(*values)
    return health


def test_the_alarm_names_a_discriminator_that_has_won_learned_nothing_or_diverges() -> None:
    config = DiscriminatorConfig(alarm_after_steps=100)
    for values, word in (
        ((0.999, 1.5, -1.5), "won"),
        ((0.5, 0.0, 0.0), "learned nothing"),
        ((0.7, 1.0, 1.0), None),
        ((0.7, 0.5, -80.0), "diverges"),
    ):
        assert adversarial.collapse_alarm(config, run(DiscriminatorHealth(), 99, *values)) is None
        message = adversarial.collapse_alarm(config, run(DiscriminatorHealth(), 100, *values))
        assert (message is None) if word is None else (word in message and "discriminator." in message)


def test_the_alarm_forgets_a_bad_start() -> None:
    config = DiscriminatorConfig(alarm_after_steps=100)
    health = run(run(DiscriminatorHealth(), 300, 0.5, 0.0, 0.0), 600, 0.75, 0.5, -0.5)
    assert health.accuracy == pytest.approx(0.75, abs=0.02)
    assert adversarial.collapse_alarm(config, health) is None


def test_running_means_start_as_plain_means() -> None:
    health = DiscriminatorHealth().updated(1.0, 2.0, -2.0).updated(0.0, 4.0, 0.0)
    assert health == DiscriminatorHealth(2, 0.5, 3.0, -1.0)
