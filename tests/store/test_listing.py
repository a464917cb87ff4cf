"""What a source of an encoding holds: nothing in it is left out without a reason that rejects.jsonl has."""

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import table
from PIL import Image
from stores import SMALL, digest, tiny_codec

from latentcodec.pixels import decode_image
from latentcodec.sources.images import Place, open_source
from latentcodec.sources.tars import TarSource
from latentcodec.store import LatentStore, StoreError, listing
from latentcodec.store.items import Columns, Entry, EntryReader, dataset_of
from latentcodec.store.job import encode, prepare
from latentcodec.store.listing import Listed, list_entries


def picture(grey):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar(path, members):
    """A tar of (name, bytes) or (name, type, target of a link)."""
    with tarfile.open(path, "w") as archive:
        for name, *content in members:
            item = tarfile.TarInfo(name)
            if isinstance(content[0], bytes) and len(content) == 1:
                item.size = len(content[0])
                archive.addfile(item, io.BytesIO(content[0]))
            else:
                item.type, item.linkname = content
                archive.addfile(item)
    return path


def greys(listed):
    reader = EntryReader(Columns(), with_captions=True)
    return [
        round(float(decode_image(reader.picture(entry), 1)[0, 0, 0] + 1) * 127.5)
        for entry, reason in listed
        if reason is None
    ]


def left_out(listed):
    return {entry.id: reason for entry, reason in listed if reason is not None}


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


# --- more of a source that a store has already


def encoded(source, out, **options):
    prepare([str(source)], out, tiny_codec(), **SMALL, **options)
    encode(out, workers=0)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return [(item.source, item.id) for item in LatentStore(out)], rejects


@pytest.fixture
def saved(tmp_path):
    """A data set of two splits, of three and two pictures."""
    splits = {name: table(greys, [{"bytes": picture(grey), "path": None} for grey in greys])
              for name, greys in (("train", (10, 20, 30)), ("test", (40, 50)))}  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_another_split_is_other_pictures(saved, tmp_path):
    out = tmp_path / "store"
    train, _ = encoded(saved, out)
    assert train == [(str(saved), f"row {row}") for row in range(3)]
    both, _ = encoded(saved, out, columns=Columns(split="test"))
    assert both == [*train, *((f"{saved} [test]", f"row {row}") for row in range(2))]
    assert encoded(saved, out, columns=Columns(split="test"))[0] == both
    assert Columns(subset="big").source("a/b") == "a/b [big, train]"
    assert Columns(subset="big").name("a/b [big, train]") == "a/b"


def test_an_unfinished_store_is_not_gone_on_with_in_another_split(saved, tmp_path):
    prepare([str(saved)], tmp_path / "store", tiny_codec(), **SMALL)
    with pytest.raises(StoreError, match=r"Finish it first, with the split 'train'.*not 'test'"):
        prepare([str(saved)], tmp_path / "store", tiny_codec(), columns=Columns(split="test"), **SMALL)


def test_a_data_set_that_grows_past_a_power_of_ten_keeps_its_rows(tmp_path):
    file = tmp_path / "set.parquet"
    for count in (9, 10):
        table(range(count), [{"bytes": picture(n), "path": None} for n in range(count)]).to_parquet(file)
        dataset_of.cache_clear()
        found, _ = encoded(file, tmp_path / "store")
        assert found == [(str(file), f"row {row}") for row in range(count)]


def test_rows_as_earlier_plans_named_them_are_known(saved, tmp_path, monkeypatch):
    """With zeros before their numbers, and the same for every split."""

    def rows(name, columns):
        return [Listed(Entry(f"row {row:02}", name, "row", offset=row)) for row in range(2)]

    monkeypatch.setattr(listing, "_rows", rows)
    before = encoded(saved, tmp_path / "store", columns=Columns(split="test"))
    assert before[0] == [(str(saved), "row 00"), (str(saved), "row 01")]
    monkeypatch.undo()
    assert encoded(saved, tmp_path / "store", columns=Columns(split="test")) == before
    assert len(encoded(saved, tmp_path / "store")[0]) == 5


def test_what_was_left_out_is_tried_again(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    (photos / "a.png").write_bytes(picture(10))
    (photos / "b.png").write_bytes(b"")
    (photos / "c.png").write_bytes(b"")
    found, rejects = encoded(photos, out)
    assert (len(found), [reject["path"][-5:] for reject in rejects]) == (1, ["b.png", "c.png"])
    whole = digest(out)
    assert encoded(photos, out) == (found, rejects)  # nothing has changed
    assert digest(out) == whole
    (photos / "b.png").write_bytes(picture(20))
    found, rejects = encoded(photos, out)
    assert ([name for _, name in found], [reject["path"][-5:] for reject in rejects]) == (
        ["a.png", "b.png"],
        ["c.png"],
    )


def test_a_tar_beside_pictures_is_added_by_its_own_name(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    (photos / "a.png").write_bytes(picture(10))
    (photos / "b.png").write_bytes(picture(20))
    shard = tar(photos / "one.tar", [("t.png", picture(90))])
    assert len(encoded(photos, out)[1]) == 1
    found, rejects = encoded(shard, out)
    assert ([name for _, name in found], rejects) == (["a.png", "b.png", "t.png"], [])
    assert encoded(photos, out) == (found, rejects)


def test_a_picture_that_a_shard_has_left_out_comes_back_with_the_shard(tmp_path):
    """As docs/encode.md says."""
    photos, out = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    (photos / "a.png").write_bytes(picture(10))
    (photos / "b.png").write_bytes(picture(20)[:-40])  # with a sound header
    found, (reject,) = encoded(photos, out, size=16)
    assert ([name for _, name in found], reject["path"]) == (["a.png"], f"{photos}/b.png")
    (photos / "b.png").write_bytes(picture(20))
    (out / reject["shard"]).unlink()
    found, rejects = encoded(photos, out, size=16)
    assert ([name for _, name in found], rejects) == (["a.png", "b.png"], [])


# --- the same twice


@pytest.fixture
def nested(tmp_path):
    """A folder with pictures, and latents of another program, in it and in a folder within."""
    for name, grey in (("a", 10), ("b", 20), ("sub/c", 30)):
        path = tmp_path / f"photos/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(picture(grey))
        np.savez(path.with_suffix(".npz"), latents=np.zeros((4, 8, 8), np.float32))
    return tmp_path / "photos"


@pytest.mark.parametrize("inner", ["", "sub"])
@pytest.mark.parametrize(("imported", "suffix"), [(None, "png"), ("raw", "npz")])
def test_a_picture_that_two_sources_hold_is_refused(nested, tmp_path, inner, imported, suffix):
    with pytest.raises(ValueError, match=rf"photos/.*\.{suffix}: named twice.*no folder within another"):
        prepare(
            [str(nested), str(nested / inner)], tmp_path / "store", tiny_codec(), imported=imported, **SMALL
        )


@pytest.mark.parametrize("imported", [None, "raw"])
def test_a_folder_within_one_that_a_store_has_brings_nothing_new(nested, tmp_path, imported):
    found, _ = encoded(nested, tmp_path / "store", imported=imported)
    assert len(found) == 3
    assert encoded(nested / "sub", tmp_path / "store", imported=imported)[0] == found


def test_a_tar_beside_pictures_may_be_named_together_with_its_folder(nested):
    shard = tar(nested / "one.tar", [("t.png", picture(90))])
    listed = list_entries([str(nested), str(shard)])
    assert (greys(listed), left_out(listed)) == ([10, 20, 30, 90], {})
