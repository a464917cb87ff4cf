"""Pictures encoded inside other pipelines: `EncodeBatch` in datasets.map and in a plain loop."""

import numpy as np
import pytest

from latentcodec.pixels import load_image
from latentcodec.store import EncodeBatch


def test_encode_batch_in_datasets_map(photos, codec):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": (photos / f"{n:03}.png").read_bytes(), "path": f"{n}.png"} for n in range(3)]
    cells.insert(1, {"bytes": b"no picture", "path": "bad.png"})
    table = datasets.Dataset.from_dict(
        {"image": cells, "path": [cell["path"] for cell in cells]},
        features=datasets.Features({"image": datasets.Image(decode=False), "path": datasets.Value("string")}),
    )
    rows = table.map(EncodeBatch(codec), batched=True, batch_size=4, remove_columns=["image"])
    assert rows["path"][:] == ["0.png", "bad.png", "1.png", "2.png"]
    assert [error is None for error in rows["error"]] == [True, False, True, True]
    assert "bad.png" in rows["error"][1]
    latent = codec.encode(load_image(photos / "001.png"))[0]
    assert np.allclose(np.array(rows["latent"][2]), latent.numpy(), atol=1e-5)
    assert rows["latent"][1] is None


def test_encode_batch_refuses_sizes_as_an_encoding_does(photos, codec):
    with pytest.raises(ValueError, match="--size and --area"):
        EncodeBatch(codec, size=16, area=256)
    with pytest.raises(ValueError, match="--multiple belongs to --area"):
        EncodeBatch(codec, multiple=8)
    with pytest.raises(ValueError, match="--size 2: at least 4, one latent cell"):
        EncodeBatch(codec, size=2)({"bytes": [(photos / "000.png").read_bytes()]})


def test_encode_batch_in_a_plain_loop(photos, codec):
    batch = EncodeBatch(codec, size=16)({"bytes": [(photos / "000.png").read_bytes()], "path": ["000.png"]})
    assert batch["latent"][0].shape == (4, 4, 4)
    with pytest.raises(ValueError, match="'image' or 'bytes'"):
        EncodeBatch(codec)({"path": ["000.png"]})
