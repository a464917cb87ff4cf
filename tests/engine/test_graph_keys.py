"""When a CUDA graph may be replayed, and in which order. Without a GPU: recordings that compute nothing stand in."""

import logging
import sys
import weakref
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from stock_pairs import pair
from test_recordings import CONFIG
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import small_vae

from latentcodec import optimize_vae, restore_vae
from latentcodec.engine import cuda_graphs


@dataclass(frozen=True)
class Pass:
    """Stands in for a pass over strips of so many bytes."""

    strip_bytes: int = 1
    scratch: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def compute(self, network, x):
        self.scratch.resize_(100)
        return [f"computed in strips of {self.strip_bytes}"] if self.strip_bytes > 1 else ["computed"]


class Counted:
    """Stands in for a recorded graph."""

    def __init__(self, run, x):
        self.run = run

    def result(self, x, join):
        return join(["replayed"])


@pytest.fixture
def network(monkeypatch):
    """One whose pass has been recorded."""
    monkeypatch.setattr(cuda_graphs, "Recording", Counted)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4))
    assert [run(network) for _ in range(3)] == ["computed", "replayed", "replayed"]
    return network


def run(network, batch=1, strip_bytes=1):
    x = torch.zeros(batch, 3, 8, 8)
    return cuda_graphs.replayed(
        network, x, lambda: partial(Pass.compute, Pass(strip_bytes), network), lambda strips: strips[0]
    )


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


@pytest.mark.parametrize("leave", [restore_vae, lambda vae: vae.to("meta")], ids=["restored", "moved"])
def test_a_vae_that_is_restored_or_moved_leaves_no_recording_behind(monkeypatch, leave):
    monkeypatch.setattr(cuda_graphs, "Recording", Counted)
    _, vae = pair(CONFIG)
    networks = vae.encoder, vae.decoder
    assert [run(network) for network in networks for _ in range(2)] == ["computed", "replayed"] * 2
    vae.to("cpu", torch.float32)  # where it is
    assert all(network in cuda_graphs._seen for network in networks)
    leave(vae)
    assert not any(network in cuda_graphs._seen for network in networks)


def test_a_vae_with_frames_is_restored_without_its_recordings(monkeypatch):
    """Its networks stay with it."""
    monkeypatch.setattr(cuda_graphs, "Recording", Counted)
    vae = optimize_vae(small_vae("qwen"))
    assert run(vae.decoder) == "computed"
    assert vae.decoder in cuda_graphs._seen
    restore_vae(vae)
    assert vae.decoder not in cuda_graphs._seen


# ---- recordings that fail


class Failing:
    """Stands in for a graph that cannot be recorded."""

    tries = 0

    def __init__(self, run, x):
        type(self).tries += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_cannot_be_recorded_is_computed_and_not_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "Recording", Failing)
    monkeypatch.setattr(Failing, "tries", 0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    with caplog.at_level(logging.WARNING):
        assert [run(network) for _ in range(4)] == ["computed"] * 4
    assert Failing.tries == 1
    assert [record.getMessage() for record in caplog.records] == [
        "a pass runs without a CUDA graph, slower but equal: CUDA out of memory"
    ]
    run(network, batch=2), run(network, batch=2)
    assert Failing.tries == 2, "another kind of input may be recorded"


def test_a_pass_is_recorded_as_it_was_planned_first_and_holds_no_memory_until_then(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Recording", Counted)
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    run(network, strip_bytes=2)
    assert cuda_graphs._seen[network].planned.scratch.numel() == 0
    assert run(network, strip_bytes=3) == "replayed"
    recorded = cuda_graphs._seen[network].recording.run
    with torch.inference_mode():
        assert recorded(None) == ["computed in strips of 2"]


def test_what_is_known_of_a_network_goes_with_it():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    run(network)
    gone = weakref.ref(network)
    del network
    assert gone() is None


# ---- streams


@pytest.fixture
def events(monkeypatch):
    """What is done on a GPU that is not there, in its order."""
    done = []

    class Stream:
        def __init__(self, name="a side stream"):
            self.name = name

        def wait_event(self, event):
            done.append(f"{self.name} waits")

        def __enter__(self):
            done.append(f"{self.name} is current")

        def __exit__(self, *error):
            done.append(f"{self.name} is not")

    class Graph:
        def replay(self):
            done.append("replay")

    class Event:
        def record(self, stream):
            done.append(f"{stream.name} has read")

    class Capture:
        def __init__(self, graph, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            done.append(f"{self.stream.name} records")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: done.append(f"{stream.name} holds"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("the caller's"))
    for name, fake in dict(Stream=Stream, CUDAGraph=Graph, Event=Event, graph=Capture).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return done


def test_a_replay_waits_until_the_result_before_has_been_read(events):
    recording = cuda_graphs.Recording(lambda x: [x], torch.zeros(2))
    del events[:]
    for number in (1.0, 2.0):
        joined = recording.result(
            torch.full((2,), number), lambda strips: events.append("join") or strips[0] + 0
        )
        assert joined.tolist() == [number] * 2
        assert not joined.is_inference(), "it may be trained on"
    once = ["the caller's waits", "the caller's holds", "replay", "join", "the caller's has read"]
    assert events == once * 2


def test_a_recording_has_a_stream_of_its_own_gpu_which_is_left_after_a_failure_too(events):
    def fails(x):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        cuda_graphs.Recording(fails, torch.zeros(2))
    assert events == ["a side stream is current", "a side stream records", "a side stream is not"]
