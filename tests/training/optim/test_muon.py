"""Muon against the singular value decomposition and against torch's own AdamW and Muon."""

import copy

import pytest
import torch
from small_runs import small, start, train, write_images

from latentcodec.training.optim.muon import Muon, orthogonal
from latentcodec.training.optim.schedule import load_optimizer


def matrix(rows: int, columns: int, condition: float = 30.0) -> torch.Tensor:
    """[rows, columns] with singular values between 1 and 1 / condition."""
    generator = torch.Generator().manual_seed(rows)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), len(v))) @ v


@pytest.mark.parametrize(("rows", "columns"), [(32, 288), (96, 96), (64, 8), (1, 9)])
def test_steps_are_orthogonal_and_keep_the_singular_vectors(rows, columns):
    g = matrix(rows, columns)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    core = u.T @ orthogonal(g) @ v.T
    assert 0.65 < core.diagonal().min() <= core.diagonal().max() < 1.25
    torch.testing.assert_close(core, torch.diag(core.diagonal()), atol=2e-4, rtol=0)


def test_a_gradient_of_zero_moves_nothing():
    assert not orthogonal(torch.zeros(4, 6)).any()


@pytest.mark.parametrize("scale", [1e-20, 1e-24, 1e-37])
def test_the_step_of_a_tiny_gradient_is_that_of_the_same_gradient_at_any_other_size(scale):
    g = matrix(8, 24)
    torch.testing.assert_close(orthogonal(g * scale), orthogonal(g), atol=1e-3, rtol=0)


def test_an_average_that_fades_to_nothing_leaves_the_weight_finite():
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    muon = Muon([{"params": [weight], "orthogonal": True, "weight_decay": 0.0, "lr": 1e-3}], fused=True)
    for step in range(2200):  # 0.95^2200 is below the smallest subnormal
        weight.grad = matrix(4, 6) if step == 0 else torch.zeros(4, 6)
        muon.step()
    assert weight.isfinite().all()


def test_a_closure_is_evaluated_once_and_before_any_weight_moves():
    ours, theirs = ([torch.nn.Parameter(matrix(8, 8)) for _ in range(2)] for _ in range(2))
    optimizers = [
        Muon(
            [{"params": [w], "orthogonal": o} for w, o in zip(weights, (True, False), strict=True)],
            fused=True,
        )
        for weights in (ours, theirs)
    ]

    def closure() -> torch.Tensor:
        loss = (ours[0] @ ours[1]).square().sum()
        loss.backward()
        return loss

    (theirs[0] @ theirs[1]).square().sum().backward()
    expected = (theirs[0] @ theirs[1]).square().sum()
    optimizers[1].step()
    assert optimizers[0].step(closure) == expected
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_steps_are_those_of_torch_for_gradients_of_any_size():
    """torch.optim.Muon knows matrices only and computes in bfloat16."""
    ours, theirs = (torch.nn.Parameter(matrix(48, 96)) for _ in range(2))
    group = {"params": [ours], "orthogonal": True, "weight_decay": 0.1, "lr": 0.02}
    optimizer = Muon([group], fused=True)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="original")
    start = ours.detach().clone()
    for scale in (1.0, 1e-4, 3.0):
        gradient = scale * torch.randn(48, 96, generator=torch.Generator().manual_seed(7))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_kernels_move_as_the_matrices_they_are_in_either_layout():
    kernel = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(torch.zeros_like(kernel).to(memory_format=layout))
        weight.grad = kernel.clone()
        Muon([{"params": [weight], "orthogonal": True, "weight_decay": 0.0, "lr": 1.0}], fused=True).step()
        steps.append(weight.detach())
    torch.testing.assert_close(*steps)
    torch.testing.assert_close(-steps[0].flatten(1), orthogonal(kernel.flatten(1)), atol=1e-4, rtol=0)


def test_tall_matrices_move_further():
    weight = torch.nn.Parameter(torch.zeros(64, 16))
    weight.grad = matrix(64, 16)
    Muon([{"params": [weight], "orthogonal": True, "weight_decay": 0.0, "lr": 1.0}], fused=True).step()
    assert 2 * 0.65 < torch.linalg.matrix_norm(weight, 2) < 2 * 1.25


def test_other_groups_are_torchs_adamw():
    ours, theirs = (torch.nn.Parameter(matrix(8, 8)) for _ in range(2))
    optimizer = Muon([{"params": [ours], "orthogonal": False}], lr=1e-2, betas=(0.9, 0.95), fused=True)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        ours.grad, theirs.grad = matrix(8, 8), matrix(8, 8)
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_a_saved_optimizer_goes_on_to_the_bit():
    def optimizer() -> tuple[Muon, list[torch.nn.Parameter]]:
        weights = [torch.nn.Parameter(matrix(8, 8)) for _ in range(2)]
        groups = [{"params": [w], "orthogonal": o} for w, o in zip(weights, (True, False), strict=True)]
        return Muon(groups, lr=1e-2, fused=True), weights

    def step(muon: Muon, weights: list[torch.nn.Parameter], seed: int) -> None:
        for weight in weights:
            weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        muon.step()

    muon, weights = optimizer()
    step(muon, weights, 1)
    again, copies = optimizer()
    load_optimizer(again, copy.deepcopy(muon.state_dict()))
    with torch.no_grad():
        for new, weight in zip(copies, weights, strict=True):
            new.copy_(weight)
    step(muon, weights, 2)
    step(again, copies, 2)
    assert all(torch.equal(new, weight) for new, weight in zip(copies, weights, strict=True))


def test_a_training_step_moves_the_weights_inside_the_blocks_by_orthogonal_matrices(tmp_path):
    """AdamW's first step has entries of one size, whatever the gradient; an orthogonal one has not."""
    config = small(tmp_path / "run", write_images(tmp_path / "images"), weight_decay=0.0, warmup=0.0)
    trainer = start(config)
    weights = dict(trainer.state.codec.vae.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    train(trainer, kill_at=1)
    moved = {name: weight.detach() - before[name] for name, weight in weights.items() if weight.ndim == 4}
    moved = {name: step for name, step in moved.items() if step.any()}
    spread = {name: (step.abs().std() / step.abs().mean()).item() for name, step in moved.items()}
    inner = {name for name in moved if "block" in name}
    assert len(inner) > 10
    assert min(spread[name] for name in inner) > 0.3
    assert max(spread[name] for name in moved.keys() - inner) < 0.1
    for name in inner:  # those singular values that are not zero are of one size
        values = torch.linalg.svdvals(moved[name].flatten(1))
        values = values[values > 1e-3 * values.max()]
        assert values.mean() > 0.5 * values.max(), name
