"""When a CUDA graph may be replayed. Without a GPU: recordings that compute nothing stand in."""

import pytest
import torch
from stock_pairs import pair
from test_recordings import CONFIG
from torch import nn

from latentcodec import optimize_vae
from latentcodec.engine import cuda_graphs


class Counted:
    """Stands in for a recorded graph."""

    def __init__(self, run, x):
        self.run = run

    def replay(self, x):
        return ["replayed"]


@pytest.fixture
def network(monkeypatch):
    """One whose pass has been recorded."""
    monkeypatch.setattr(cuda_graphs, "Recording", Counted)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4))
    assert [run(network) for _ in range(3)] == ["computed", "replayed", "replayed"]
    return network


def run(network, batch=1):
    x = torch.zeros(batch, 3, 8, 8)
    return cuda_graphs.replayed(network, x, lambda: lambda x: ["computed"], lambda strips: strips[0])


@pytest.mark.parametrize(
    ("layer", "attribute", "value"),
    [(0, "padding_mode", "circular"), (0, "stride", (2, 2)), (1, "eps", 0.5), (1, "num_groups", 4)],
)
def test_a_setting_that_changes_ends_the_recording(network, layer, attribute, value):
    setattr(network[layer], attribute, value)
    assert [run(network) for _ in range(2)] == ["computed", "replayed"]


def test_a_layer_of_another_kind_ends_the_recording(network):
    network[1].__class__ = nn.BatchNorm2d
    assert run(network) == "computed"


def test_weights_that_move_and_inputs_of_another_shape_end_the_recording(network):
    network[0].weight.data = network[0].weight.data.clone()
    assert run(network) == "computed"
    assert run(network, batch=2) == "computed"


def test_another_bound_on_memory_ends_the_recording(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Recording", Counted)
    _, vae = pair(CONFIG)
    for network in (vae.encoder, vae.decoder):
        assert [run(network) for _ in range(2)] == ["computed", "replayed"]
    optimize_vae(vae, max_memory="1GB")
    assert [run(network) for network in (vae.encoder, vae.decoder)] == ["computed", "computed"]
