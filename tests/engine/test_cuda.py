"""What holds on CPUs holds on a GPU: exact strips, small images replayed, training that resumes."""

import copy
import json

import pytest
import torch
from small_runs import small, start, train, write_images
from stock_pairs import CONFIGS, pair

from latentcodec.adopt import optimize_vae
from latentcodec.engine import cuda_graphs, plan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*cudnn:UserWarning"),  # of a plan that cuDNN tried and passed over
    pytest.mark.filterwarnings("ignore:Please use the new API:UserWarning"),  # of a call inside torch 2.11
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """float32 is float32 in convolutions too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs(configuration, batch=2, cells=(9, 5)):
    """An image of odd size and a latent of `cells`."""
    f = 2 ** (len(configuration["block_out_channels"]) - 1)
    x = torch.rand(batch, configuration.get("in_channels", 3), cells[0] * f + 1, cells[1] * f + f // 2)
    z = torch.randn(batch, configuration.get("latent_channels", 4), *cells)
    return {"encoder": x.cuda() * 2 - 1, "decoder": z.cuda()}


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_strips_equal_diffusers_in_every_configuration(name, strip_bytes, monkeypatch):
    monkeypatch.setitem(plan.STRIP_BYTES, "cuda", strip_bytes)
    reference, ours = (vae.cuda() for vae in pair(CONFIGS[name]))
    optimize_vae(ours)
    with torch.no_grad():
        for part, value in inputs(CONFIGS[name]).items():
            expected = getattr(reference, part)(value)
            error = (getattr(ours, part)(value) - expected).abs().max()
            assert error <= 1e-4 * (expected.max() - expected.min()), part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "flux", "photo-f8c16"])
def test_half_precision_errs_no_more_than_diffusers(name, dtype):
    """Root mean square against float32 with the same rounded weights, over four models and both directions."""
    squares = torch.zeros(2)
    for seed in range(4):
        torch.manual_seed(seed)
        stock = pair(CONFIGS[name])[0].cuda().type(dtype)
        exact, ours = copy.deepcopy(stock).float(), optimize_vae(copy.deepcopy(stock))
        with torch.no_grad():
            for part, value in inputs(CONFIGS[name], cells=(12, 8)).items():
                expected = getattr(exact, part)(value.to(dtype).float())
                for side, vae in enumerate((ours, stock)):
                    error = getattr(vae, part)(value.to(dtype)).float() - expected
                    squares[side] += (error.square().mean() / expected.var()).cpu()
    assert squares[0] <= squares[1]


def test_a_bound_on_memory_changes_nothing():
    _, ours = (vae.cuda() for vae in pair(CONFIGS["sd"]))
    z = torch.randn(1, 4, 64, 64, device="cuda")
    widest = 512 * 512 * 32 * 4
    with torch.no_grad():
        expected = optimize_vae(ours).decode(z).sample
        torch.cuda.synchronize()
        actual = optimize_vae(ours, max_memory=int(1.3 * widest)).decode(z).sample
    assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def test_small_images_are_replayed_with_the_weights_of_the_moment(monkeypatch):
    """Changed behind autograd's back, moved to the CPU and back; and other shapes come between."""
    reference, ours = (vae.cuda() for vae in pair(CONFIGS["sd"]))
    optimize_vae(ours)
    replays = []
    replay = cuda_graphs.Recording.replay
    monkeypatch.setattr(cuda_graphs.Recording, "replay", lambda self, x: replays.append(1) or replay(self, x))

    def compare(*shape):
        z = torch.randn(*shape, device="cuda")
        reference.load_state_dict(ours.state_dict())
        with torch.no_grad():
            expected, actual = reference.decoder(z), ours.decoder(z)
        assert (actual - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())

    for _ in range(3):
        compare(1, 4, 8, 8)
    assert len(replays) == 2
    ours.decoder.conv_in.weight.data *= 2
    ours.decoder.up_blocks[0].upsamplers[0].conv.weight.data += 0.1
    compare(1, 4, 8, 8)
    assert len(replays) == 3
    compare(2, 4, 5, 8)
    compare(1, 4, 8, 8)
    assert len(replays) == 3
    ours.cpu().cuda()
    for _ in range(3):
        compare(1, 4, 8, 8)
    assert len(replays) >= 5


def test_a_replayed_result_is_not_overwritten_and_may_be_trained_on():
    _, ours = (vae.cuda() for vae in pair(CONFIGS["sd"]))
    optimize_vae(ours)
    z = torch.randn(4, 1, 4, 8, 8, device="cuda")
    with torch.no_grad():
        results = [ours.decode(value).sample for value in z]
        expected = ours.decode(z.flatten(0, 1)).sample
    torch.testing.assert_close(torch.cat(results), expected, rtol=1e-3, atol=1e-3)
    (torch.ones(1, device="cuda", requires_grad=True) * results[2]).sum().backward()


def losses(output):
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [line["total"] for line in lines if "total" in line]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_goes_on_where_it_stopped(precision, tmp_path):
    images = write_images(tmp_path / "images")
    settings = dict(mixed_precision=precision, max_steps=12, warmup=0.1)
    train(start(small(tmp_path / "whole", images, **settings)))
    train(start(small(tmp_path / "parts", images, **settings)), stop_at=6)
    train(start(small(tmp_path / "parts", images, **settings)))
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == len(parts) == 12
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=2e-2, atol=2e-2)
