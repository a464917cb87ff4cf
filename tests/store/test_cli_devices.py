"""The device of a command: every verb takes a GPU where there is one, and a store is gone on with on another."""

import numpy as np
import pytest
import typer
from small_commands import encode_the_photographs

from latentcodec.cli import app
from latentcodec.cli.output import DEVICE
from latentcodec.store import encode, prepare
from latentcodec.store.plan import plan_digest

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def store(place):
    return encode_the_photographs(place)


def test_a_store_begun_on_a_device_that_is_not_here_is_gone_on_with_on_another(
    place, tmp_path, codec_of_plan
):
    store = codec_of_plan(tmp_path / "store", "cuda:99")
    with pytest.raises(ValueError, match=r"store: device cuda:99: PyTorch finds .* \(--device\)"):
        encode(store, workers=0)
    assert encode(store, workers=0, device="cpu").index.items == 5


@pytest.fixture
def codec_of_plan(place):
    """Plans a store as on a machine with such a device."""

    def planned(store, device):
        plan = prepare([str(place / "photos")], store, str(place / "codec"), threads=1, shard_size=2)
        part = plan.parts[0]
        part.machine["device"] = device
        part.about["digest"] = plan_digest({k: v for k, v in part.about.items() if k != "digest"}, part.table)
        next((store / "plan").iterdir()).write_bytes(part.to_bytes())
        return store

    return planned


VERBS_ON_A_DEVICE = {
    "encode": ("encode", "{photos}", "--codec", "{codec}", "--out", "{new}"),
    "decode a store": ("decode", "{store}", "--out", "{new}"),
    "decode a file": ("decode", "{file}", "--codec", "{codec}", "--out", "{new}"),
    "reconstruct": ("reconstruct", "{photos}", "--codec", "{codec}", "--out", "{new}"),
    "inspect": ("inspect", "{codec}", "--images", "{photos}"),
}


@pytest.fixture
def places(place, store, tmp_path):
    """What the names in VERBS_ON_A_DEVICE stand for."""
    np.save(tmp_path / "z.npy", np.zeros((4, 8, 8), np.float32))
    known = {"photos": place / "photos", "codec": place / "codec", "store": store, "file": tmp_path / "z.npy"}
    return known | {"new": tmp_path / "new"}


@pytest.mark.parametrize("verb", VERBS_ON_A_DEVICE)
def test_every_verb_takes_a_gpu_where_there_is_one(places, call, monkeypatch, verb):
    devices = []

    def to(vae, device):
        devices.append(str(device))
        raise ValueError("as far as this machine can go")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    monkeypatch.setattr("latentcodec.store.job.has_triton", lambda: False)
    monkeypatch.setattr("diffusers.AutoencoderKL.to", to)
    monkeypatch.setattr("latentcodec.machine.use_cores", lambda: 1)
    arguments = [argument.format(**places) for argument in VERBS_ON_A_DEVICE[verb]]
    assert call(*arguments)[0] == 2
    assert devices == ["cuda"]
    options = typer.main.get_command(app).commands[arguments[0]].params
    assert [option.help for option in options if option.name == "device"] == [DEVICE]


@pytest.mark.parametrize("verb", VERBS_ON_A_DEVICE)
def test_every_verb_lets_a_codec_on_a_gpu_run_compiled(places, call, monkeypatch, verb):

    def run_compiled(codec):
        raise ValueError("it would run compiled")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    monkeypatch.setattr("diffusers.AutoencoderKL.to", lambda vae, device: vae)
    monkeypatch.setattr("latentcodec.machine.use_cores", lambda: 1)
    monkeypatch.setattr("latentcodec.store.job.has_triton", lambda: True)
    for module in ("codec", "store.encoding"):
        monkeypatch.setattr(f"latentcodec.{module}.run_compiled", run_compiled)
    arguments = [argument.format(**places) for argument in VERBS_ON_A_DEVICE[verb]]
    code, _, err = call(*arguments)
    assert (code, err.splitlines()[-1]) == (2, "error: it would run compiled")
