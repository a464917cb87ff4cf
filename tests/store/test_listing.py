"""What a source of an encoding holds: nothing in it is left out without a reason that rejects.jsonl has."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grey_pictures import greys, left_out, picture, tar
from image_sets import table
from stores import SMALL, tiny_codec

from latentcodec.sources.images import Place, open_source
from latentcodec.sources.tars import TarSource
from latentcodec.store import LatentStore
from latentcodec.store.items import Columns, EntryReader
from latentcodec.store.job import encode, prepare
from latentcodec.store.listing import list_entries


def test_links_in_a_tar_are_followed_or_named(tmp_path):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members = [
        ("a.png", picture(10)),
        ("b.png", hard, "a.png"),
        ("c.png", soft, "a.png"),
        ("d.png", hard, "no.png"),
    ]
    shard = tar(tmp_path / "a.tar", [*members, ("e.jp2", b"x"), ("f.png", picture(60))])
    listed = list_entries([str(shard)])
    assert greys(listed) == [10, 10, 60]
    reasons = left_out(listed)
    assert reasons.keys() == {"c.png", "d.png", "e.jp2"}
    assert "not followed" in reasons["c.png"]
    assert "not in this tar" in reasons["d.png"]
    assert len(TarSource([shard], None, 3)) == 3


def test_captions_of_a_tar_made_from_inside_a_folder_are_found(tmp_path):
    shard = tar(tmp_path / "a.tar", [("./x/a.png", picture(1)), ("./x/a.txt", b"a cat")])
    ((entry, _),) = list_entries([str(shard)])
    assert EntryReader(Columns(), with_captions=True).caption_and_label(entry) == ("a cat", None)


def test_the_mark_that_editors_put_in_front_is_no_part_of_a_caption(tmp_path):
    text = "a cat".encode("utf-8-sig")
    (tmp_path / "b.png").write_bytes(picture(2))
    (tmp_path / "b.txt").write_bytes(text)
    shard = tar(tmp_path / "a.tar", [("a.png", picture(1)), ("a.txt", text)])
    for item in list_entries([str(tmp_path / "b.png"), str(shard)]):
        assert EntryReader(Columns(), with_captions=True).caption_and_label(item.entry) == ("a cat", None)


@pytest.mark.parametrize("column", ["caption", "label"])
def test_a_column_where_there_are_none_is_refused(tmp_path, column):
    shard, out = tar(tmp_path / "a.tar", [("a.png", picture(1))]), tmp_path / "store"
    columns = Columns(**{column: "kind"})
    with pytest.raises(ValueError, match=f"--{column}-column kind: there are no columns in image and tar"):
        prepare([str(shard)], out, tiny_codec(), columns=columns, **SMALL)
    assert not out.exists()


def test_pictures_without_columns_are_added_to_those_of_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int64")})
    cells = {"image": [{"bytes": picture(3), "path": None}], "kind": [7]}
    datasets.Dataset.from_dict(cells, features=features).to_parquet(tmp_path / "set.parquet")
    shard = tar(tmp_path / "a.tar", [("a.png", picture(1))])
    for source in (tmp_path / "set.parquet", shard):
        prepare([str(source)], tmp_path / "store", tiny_codec(), columns=Columns(label="kind"), **SMALL)
        encode(tmp_path / "store", workers=0)
    assert [item.label for item in LatentStore(tmp_path / "store")] == [7, None]


@pytest.mark.parametrize("damage", ["header", "cut", "joined"])
def test_a_tar_that_goes_on_behind_its_end_is_refused(tmp_path, damage):
    shard = tar(tmp_path / "a.tar", [(f"{k}.png", picture(k)) for k in (10, 20, 30)])
    content = bytearray(shard.read_bytes())
    content[1024 + 100] ^= 255  # in the header of the second member
    broken = {
        "header": bytes(content),
        "cut": shard.read_bytes()[: 1024 + 300],
        "joined": shard.read_bytes() * 2,
    }
    shard.write_bytes(broken[damage])
    for read in (lambda: list_entries([str(shard)]), lambda: TarSource([shard], None, 3)):
        with pytest.raises(ValueError, match=r"a\.tar: not a whole.*tar file"):
            read()


def test_a_tar_beside_pictures_does_not_take_over_the_folder(tmp_path):
    for k in (10, 20, 30):
        (tmp_path / f"{k}.png").write_bytes(picture(k))
    (tmp_path / "photo.jp2").write_bytes(b"x")
    tar(tmp_path / "one.tar", [("t.png", picture(90))])
    tar(tmp_path / "none.tar", [("notes.txt", b"x")])
    listed = list_entries([str(tmp_path)])
    assert greys(listed) == [10, 20, 30]
    assert left_out(listed).keys() == {"t.png", "none.tar", "photo.jp2"}
    assert "beside 3 pictures" in left_out(listed)["t.png"]


@pytest.fixture
def write(tmp_path):
    """Writes pictures of the greys given, each with a caption, as files or as the rows of a parquet file."""

    def written(files, rows=()):
        folder = tmp_path / "set"
        (folder / "00000").mkdir(parents=True)
        for grey in files:
            (folder / f"00000/{grey}.png").write_bytes(picture(grey))
            (folder / f"00000/{grey}.txt").write_text(f"grey {grey}")
            (folder / f"00000/{grey}.json").write_text("{}")
        if rows:
            cells = [{"bytes": picture(grey), "path": None} for grey in rows]
            table(rows, cells).to_parquet(folder / "00000.parquet")
        else:
            columns = {name: [name] * len(files) for name in ("url", "key")}
            pq.write_table(pa.table(columns), folder / "00000.parquet")
        return folder

    return written


@pytest.mark.parametrize("captions", [True, False])
def test_the_metadata_that_img2dataset_leaves_is_no_data_set(write, captions):
    folder = write([10, 20, 30])
    if not captions:  # `datasets` by itself would take the files for a set of images then
        for file in [*folder.rglob("*.txt"), *folder.rglob("*.json")]:
            file.unlink()
    listed = list_entries([str(folder)])
    assert greys(listed) == [10, 20, 30]
    assert left_out(listed).keys() == {"00000.parquet"}
    assert "no column declared as images" in left_out(listed)["00000.parquet"]
    reader = EntryReader(Columns(), with_captions=True)
    assert reader.caption_and_label(listed[0].entry)[0] == ("grey 10" if captions else None)


@pytest.mark.parametrize(("files", "rows"), [((10, 20, 30), (90,)), ((10,), (90, 91)), ((10,), (90,))])
def test_training_and_encoding_read_the_same_kind_of_a_folder(write, files, rows):
    folder = write(files, rows)
    source, listed = open_source(Place(str(folder)), channels=1), list_entries([str(folder)])
    trained = [round(float(source.read(i)[0, 0, 0] + 1) * 127.5) for i in range(len(source))]
    assert greys(listed) == trained == [*(files if len(files) > len(rows) else rows)]
    assert len(left_out(listed)) == len(source.left_out) == min(len(files), len(rows))
    assert all("beside" in reason for reason in left_out(listed).values())


def test_what_a_folder_leaves_out_is_in_the_rejects_of_the_store(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(picture(10))
    (photos / "b.jp2").write_bytes(b"x")
    for size in (16, None):
        out = tmp_path / f"store-{size}"
        prepare([str(photos)], out, tiny_codec(), size=size, **SMALL)
        assert encode(out, workers=0).index.rejected == 1
        (reject,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
        assert reject == {"path": f"{photos}/b.jp2", "reason": ".jp2 files are not read; convert them"}


def test_suffixes_in_capitals_are_suffixes(tmp_path):
    shard = tar(tmp_path / "one.TAR", [("T.PNG", picture(90))])
    assert greys(list_entries([str(shard)])) == greys(list_entries([str(tmp_path)])) == [90]


ODD = [
    "x\x1b[31m.png",
    "\u2028.png",
    "\u202egnp.png",
    "caf\udce9.png",
    "a\r.png",
    "back\\x41slash.png",
    "tab\t\n.png",
]


def test_pictures_of_odd_names_are_read_with_their_captions(tmp_path):
    photos = tmp_path / "odd\x07\udcff"
    photos.mkdir()
    for number, name in enumerate(ODD):
        (photos / name).write_bytes(picture(number * 30))
        (photos / name).with_suffix(".txt").write_text(f"{number}")
    listed = list_entries([str(photos)])
    reader = EntryReader(Columns(), with_captions=True)
    numbers = [int(reader.caption_and_label(item.entry)[0]) for item in listed]
    assert sorted(numbers) == [*range(len(ODD))]
    assert greys(listed) == [number * 30 for number in numbers]


def test_a_tar_of_an_odd_name_is_encoded(tmp_path):
    tar(tmp_path / "caf\udce9\x1b.tar", [("a.png", picture(10))])
    prepare([str(tmp_path / "caf\udce9\x1b.tar")], tmp_path / "store", tiny_codec(), size=16, **SMALL)
    assert encode(tmp_path / "store", workers=0).index.items == 1
