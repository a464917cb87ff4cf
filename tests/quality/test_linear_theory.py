"""What linear theory says against a linear VAE that is trained, in float64, until nothing moves."""

import math

import pytest
import torch

from latentcodec.quality.linear_theory import eigenvalues, predict

VARIANCES = torch.tensor([6.0, 3.0, 1.5, 0.4], dtype=torch.float64)


def images(count=4000):
    """Gaussian with exactly these variances along turned axes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / count)).T
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    return (x * VARIANCES.sqrt()) @ turn.T


def trained(x, latents, kl_weight, scale):
    """KL and squared error of draws of a linear VAE, by their expectations, at the optimum."""
    generator = torch.Generator().manual_seed(1)
    encoder, decoder = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((latents, 4), (4, latents))
    )
    weights = [encoder.div(3).requires_grad_(), decoder.div(3).requires_grad_()]
    logvar = torch.zeros(latents, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([*weights, logvar], max_iter=2000, tolerance_change=1e-14, tolerance_grad=1e-10,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def parts():
        encoder, decoder = weights
        mean = x @ encoder.T
        kl = (mean.square().mean(0) + logvar.exp() - 1 - logvar).sum() / 2
        error = (x - mean @ decoder.T).square().sum(1).mean() + (decoder.square() * logvar.exp()).sum()
        return kl, error

    def closure():
        optimizer.zero_grad()
        kl, error = parts()
        loss = error / (2 * scale**2) + kl_weight * kl
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return [value.item() for value in parts()]


def test_the_variances_are_those_of_the_images():
    torch.testing.assert_close(eigenvalues(images()), VARIANCES, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("latents", "kl_weight", "scale", "alive"),
    [
        (4, 1.0, 1.0, 3),
        (2, 1.0, 1.0, 2),
        (4, 0.5, 2.0, 2),
        (4, 4.0, 1.0, 1),
        (4, 7.0, 1.0, 0),
        (3, 0.01, 1.0, 3),
    ],
)
def test_a_linear_vae_does_what_was_told(latents, kl_weight, scale, alive):
    told = predict(VARIANCES, latents, kl_weight, scale)
    kl, error = trained(images(), latents, kl_weight, scale)
    assert told.alive == alive
    assert kl == pytest.approx(told.kl, rel=1e-3, abs=2e-3)
    assert error == pytest.approx(told.squared_error, rel=1e-3)


def test_without_a_kl_it_is_pca():
    told = predict(VARIANCES, 2, 0.0)
    assert (told.alive, told.kl, told.posterior_std) == (2, math.inf, 0.0)
    assert told.squared_error == pytest.approx(1.9)
    assert predict(VARIANCES, 2, 100.0).posterior_std == 1.0
