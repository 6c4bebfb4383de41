"""The demo world is true, masks are exact, order does not depend on ranks, damage is counted and named."""
import csv
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from tokenizer import Tokenizer

# ---------------------------------------------------------------- the demo world

def test_captions_say_what_the_labels_show():
    """Read each sentence as a person would and check it on the label picture."""
    seen = set()
    for i in range(300):
        rng = np.random.default_rng([7, i])
        picture, labels, objects, ground = data.draw_scene(rng, 1 + i % 3, data.CLASSES)
        text, labels = data.describe(objects, ground, rng, full=i % 2 == 0), np.array(labels)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert set(np.unique(labels)) - {0} == {1 + data.CLASSES.index(o["name"]) for o in objects}
        middle = {o["name"]: np.argwhere(labels == 1 + data.CLASSES.index(o["name"])).mean(0) for o in objects}
        assert not {word for word in data.COLOURS if word in text} - {o["name"].split()[0] for o in objects}
        assert not {word for word in data.SHAPES if word in text} - {o["name"].split()[1] for o in objects}
        assert i % 2 or all(f"a {o['size']} {o['name']}" in text or f"one {o['size']}" in text for o in objects)
        named = sorted((text.index(o["name"]), o["name"]) for o in objects if o["name"] in text)
        for relation, axis, sign in (("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)):
            if f" {relation} " in text and len(named) == len(objects):
                (_, a), (_, b), *_ = named
                assert sign * (middle[a][axis] - middle[b][axis]) > 0, text
                seen.add(relation)
        for o in objects:
            if f"{o['size']} {o['name']}" in text:
                area = (labels == 1 + data.CLASSES.index(o["name"])).sum()
                share = dict(circle=3.14, square=2.42, diamond=2.42, triangle=1.57, star=1.23, cross=2.0, ring=2.19)
                radius = np.sqrt(area / share[o["name"].split()[1]])
                assert (radius < 11.5) == (o["size"] == "small"), (text, radius)
                seen.add(o["size"])
        if "ground" in text:
            assert f"{ground} ground" in text
            seen.add(ground)
    assert seen == {"left of", "right of", "above", "below", *data.SIZES, *data.GROUNDS}


def test_label_and_picture_are_of_one_place():
    """Where the label says red the picture is red; the ground is never of an object's colour."""
    rng = np.random.default_rng(3)
    picture, labels, objects, _ = data.draw_scene(rng, 1, ["red circle"])
    pixels, inside = np.array(picture).astype(int), np.array(labels) > 0
    red = (pixels[..., 0] > pixels[..., 1] + 80) & (pixels[..., 0] > pixels[..., 2] + 80)
    assert (red == inside).mean() > 0.97 and inside.sum() > 100


def test_draw_demo_writes_all_sets_apart_and_held_out(tmp_path):
    folder = data.draw_demo(tmp_path / "demo", shards=2, shard_size=60)
    pairs = pairs_of(folder / "train")
    assert len(pairs) == 120
    captions = " ".join(pairs[0, i][1][0] for i in range(120))
    assert not any(name in captions for name in data.HELD_OUT) and "red circle" in captions
    train = {hashlib.sha1(pairs[0, i][0]).digest() for i in range(120)}
    others = [p.read_bytes() for p in folder.rglob("*.png") if "labels" not in p.parts]
    assert len(others) == 500 + 42 * (20 + 12) + 200
    digests = {hashlib.sha1(content).digest() for content in others}
    assert len(digests) == len(others) and not train & digests  # every picture stands once, and in one set
    paths, labels, names = data.class_folder(folder / "classes/test")
    assert names == sorted(data.CLASSES) and len(names) == 42 and len(paths) == len(labels) == 504
    paths, texts, owners = data.karpathy(folder / "val")
    assert len(paths) == 500 and len(texts) == len(owners) == 1000 and all(p.is_file() for p in paths)
    stamp = (folder / "demo.json").stat().st_mtime_ns
    data.draw_demo(folder, shards=2, shard_size=60)
    assert (folder / "demo.json").stat().st_mtime_ns == stamp  # drawn once
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_a_demo_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not drawn by this program"):
        data.draw_demo(tmp_path / "demo")
    assert (tmp_path / "demo/thesis.txt").read_text() == "mine"


# ---------------------------------------------------------------- masks

@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (7, 9), (24, 24)])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.5, 0.75, 0.9, 1.0])
def test_masks_hide_exactly_the_share(grid, ratio):
    n = grid[0] * grid[1]
    for seed in range(20):
        for mask in (data.block_mask(grid, ratio, np.random.default_rng(seed)),
                     data.random_mask(n, ratio, np.random.default_rng(seed))):
            assert mask.dtype == bool and mask.shape == (n,) and mask.sum() == round(ratio * n)


def test_blocks_are_blocky_and_reach_everywhere():
    def agreement(mask):  # share of neighbouring patches of one kind
        m = mask.reshape(14, 14)
        return np.mean([*(m[1:] == m[:-1]).ravel(), *(m[:, 1:] == m[:, :-1]).ravel()])
    rngs = [np.random.default_rng(i) for i in range(300)]
    blocks = [data.block_mask((14, 14), 0.5, rng) for rng in rngs]
    randoms = [data.random_mask(196, 0.5, rng) for rng in rngs]
    assert np.mean([agreement(m) for m in blocks]) > 0.75
    assert 0.45 < np.mean([agreement(m) for m in randoms]) < 0.55
    for masks, low, high in ((blocks, 0.03, 0.92), (randoms, 0.35, 0.65)):
        often = np.mean(masks, 0)  # BEiT's blocks lie inside the grid and so prefer its middle
        assert low < often.min() and often.max() < high


# ---------------------------------------------------------------- transforms

def test_random_resized_crop_keeps_to_area_and_aspect():
    """On a picture of coordinates the crop can be read off the result."""
    y, x = np.mgrid[:200, :250].astype(np.uint8)
    image = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8))
    areas = []
    for seed in range(200):
        box = data.crop_box(250, 200, (0.3, 1.0), np.random.default_rng(seed))
        out = np.array(data.crop(image, box, 32)).astype(float)
        assert out.shape == (32, 32, 3)
        w, h = (out[:, -1, 0] - out[:, 0, 0]).mean() * 32 / 31, (out[-1, :, 1] - out[0, :, 1]).mean() * 32 / 31
        assert 0.72 < w / h < 1.39
        areas.append(w * h / (200 * 250))
    assert 0.28 < min(areas) < 0.4 and 0.8 < max(areas) <= 1.02
    assert data.crop_box(1000, 3, (0.9, 1.0), np.random.default_rng(0)) == (498, 0, 4, 3)  # its middle


def test_distorted_views_differ_and_repeat_by_seed():
    image = data.draw_scene(np.random.default_rng(0), 3, data.CLASSES)[0]
    views = [np.array(data.distort(image, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert np.array_equal(views[0], views[1]) and np.abs(views[0].astype(int) - views[2]).mean() > 5


def test_center_crop_and_normalize():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    assert np.array(data.center_crop(image, 50))[:, 1:-1].min() > 200  # the middle square alone
    x = data.normalize(torch.tensor([[[[255, 0, 128]]]], dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert x.shape == (1, 3, 1, 1) and x.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("size", [(64, 64), (97, 200), (300, 225), (30, 40)])
def test_center_crop_equals_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    theirs = transforms.Compose([transforms.Resize(48, transforms.InterpolationMode.BICUBIC),
                                 transforms.CenterCrop(48)])(image)
    difference = np.abs(np.array(theirs).astype(int) - np.array(data.center_crop(image, 48)))
    assert difference.max() == 0


# ---------------------------------------------------------------- pictures: right where they can be, else an error

def encoded(image, kind="JPEG", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def jpeg(size=(40, 30), mode="RGB", kind="JPEG"):
    return encoded(Image.new(mode, size, 90 if mode == "L" else (90, 30, 200, 0)[:len(mode)]), kind)


def left_red_right_blue(width=64, height=32):
    image = Image.new("RGB", (width, height), (220, 10, 10))
    image.paste((10, 10, 220), (width // 2, 0, width, height))
    return image


def test_decode_puts_transparency_on_white_and_reads_grey():
    assert data.decode(jpeg(mode="RGBA", kind="PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert data.decode(jpeg(mode="L", kind="PNG")).getpixel((0, 0)) == (90, 90, 90)
    image = left_red_right_blue().quantize(4)
    see_through = image.getpixel((0, 0))
    decoded = data.decode(encoded(image, "PNG", transparency=see_through))  # a palette whose red is transparent
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((60, 0))[2] > 200


@pytest.mark.parametrize("turn,where", [(1, (5, 16)), (3, (59, 16)), (6, (16, 5)), (8, (16, 59)), (2, (59, 16))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_turns_upright(turn, where, kind):
    """Red is on the left as stored; after the turn that EXIF asks for it is where `where` says."""
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(left_red_right_blue(), kind, exif=exif)
    image = data.decode(content)
    assert image.size == data.upright_size(data.open_picture(content)) == ((64, 32) if turn < 5 else (32, 64))
    assert image.getpixel(where)[0] > 200 and image.getpixel(where)[2] < 60


def test_decode_reads_animated_cmyk_and_16_bit_pictures():
    for kind in ("GIF", "WEBP", "PNG"):  # the first frame
        content = encoded(Image.new("RGB", (9, 9), "red"), kind, save_all=True,
                          append_images=[Image.new("RGB", (9, 9))])
        assert np.abs(np.array(data.decode(content))[0, 0].astype(int) - (255, 0, 0)).max() < 8
    cmyk = data.decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95))
    assert cmyk.mode == "RGB" and np.abs(np.array(cmyk)[8, 8].astype(int) - (255, 0, 0)).max() < 8
    ramp = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(4, 0)  # grey of 16 bits: convert would clip it at white
    assert np.array_equal(np.array(data.decode(encoded(Image.fromarray(ramp), "PNG")))[0, :, 1], np.arange(256))


def bomb(width=30_000, height=30_000):
    """A PNG of 30,000 x 30,000 pixels in less than 200 KB."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def noise(width=200, height=200):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


BROKEN = dict(truncated=jpeg((200, 200))[:700], text=b"this is no picture", empty=b"", bomb=bomb(),
              warned=bomb(10_000, 10_000), program=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
              png=encoded(noise(), "PNG")[:9000], webp=encoded(noise(), "WEBP")[:3000])


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_raise_what_training_catches(kind):
    with pytest.raises(data.BAD_IMAGE):
        data.decode(BROKEN[kind])


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """Pillow reads EPS through Ghostscript: a shard must not bring PostScript to run."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="no picture"):
        data.decode(eps)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError):
        Image.open(io.BytesIO(eps)).load()  # Pillow alone starts it
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_spares_the_pixels(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    content = encoded(left_red_right_blue(), kind, exif=exif)
    start = content.index(b"MM\x00*")
    spoilt = bytearray(content)
    spoilt[start:start + 4] = b"????"
    if kind == "PNG":  # whose chunks are checked
        chunk = spoilt.index(b"eXIf")
        size = int.from_bytes(spoilt[chunk - 4:chunk], "big")
        spoilt[chunk + 4 + size:chunk + 8 + size] = zlib.crc32(spoilt[chunk:chunk + 4 + size]).to_bytes(4, "big")
    assert data.decode(content).size == (32, 64) and data.decode(bytes(spoilt)).size == (64, 32)
    for value in (0, 9, 300):  # no orientation
        exif[0x0112] = value
        content = encoded(left_red_right_blue(), kind, exif=exif)
        assert data.decode(content).size == data.upright_size(data.open_picture(content)) == (64, 32)


@pytest.mark.filterwarnings("ignore:")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_spoilt_bytes_raise_nothing_else(kind):
    """300 spoilt files of each kind: a picture or one of BAD_IMAGE, never another exception that would end a run."""
    rng, exif, seen = np.random.default_rng(1), Image.Exif(), Counter()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "Maker", (72, 1)
    exif[0x8769] = {0x9000: b"0220", 0x829A: (1, 50)}
    whole = bytearray(encoded(noise(60, 50), kind, **({} if kind in ("GIF", "BMP") else dict(exif=exif))))
    start = max(0, whole.lower().find(b"exif"))
    for _ in range(300):
        content, upto = bytearray(whole), len(whole) if rng.random() < 0.3 else min(len(whole), start + 150)
        for place in rng.integers(start if upto < len(whole) else 0, upto, size=rng.integers(1, 9)):
            content[place] = rng.integers(256)
        if rng.random() < 0.3:
            del content[rng.integers(len(content)):]
        try:
            size = data.upright_size(data.open_picture(bytes(content)))
            assert data.decode(bytes(content)).size == size
            seen["decoded"] += 1
        except data.BAD_IMAGE:
            seen["refused"] += 1
    assert seen["refused"] > 5 and sum(seen.values()) == 300


def test_reduced_decoding_shows_the_same_picture():
    """A crop of a large JPEG decoded at reduced scale against the crop of all its pixels."""
    y, x = np.mgrid[:900, :1200] / 60
    pixels = 128 + 60 * np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x * y / 20)], -1)
    content, size = encoded(Image.fromarray(pixels.astype(np.uint8)), quality=95), 96
    for seed in range(20):
        x, y, w, h = box = data.crop_box(1200, 900, (0.2, 1.0), np.random.default_rng(seed))
        shrink = min(w, h) / size
        small, full = data.decode(content, shrink), data.decode(content)
        factor = 1200 / small.width
        assert factor in (1, 2, 4, 8) and factor <= shrink and full.size == (1200, 900) and (factor > 1 or shrink < 2)
        ours, theirs = (np.array(data.crop(image, box, size, (1200, 900))).astype(float) for image in (small, full))
        assert np.abs(ours - theirs).mean() < 1.5


# ---------------------------------------------------------------- sources and what is wrong with them

def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data.add_member(tar, name, content)


def members(numbers, text="text"):
    """Pairs whose picture is as wide as their number says, so that each can be told."""
    return [m for i in numbers for m in ((f"{i}.jpg", jpeg((10 + i, 30))), (f"{i}.txt", f"{text} {i}".encode()))]


def pairs_of(*names, root="."):
    return data.Pairs([str(name) for name in names], root)


def contents(pairs, epoch=0):
    """[(width of picture - 10, captions)] of all pairs."""
    found = (pairs[epoch, i] for i in range(len(pairs)))
    return [(data.decode(content).width - 10, captions) for content, captions in found]


def test_shards_read_txt_and_json_and_name_what_is_left_over(tmp_path):
    fields = dict(caption="two", title=" ", description="a title is empty", url="http://x", width=3)
    write_shard(tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.txt", b"one"), ("dir/b.PNG", jpeg(kind="PNG")),
                                     ("dir/b.json", json.dumps(fields).encode()),
                                     ("c.webp", jpeg(kind="WEBP")), ("c.json", b"{}"), ("c.txt", b" three \n"),
                                     ("d.jpeg", jpeg()), ("d.json", json.dumps(dict(captions=["4", "four"])).encode()),
                                     ("lonely.jpg", jpeg()), ("e.cls", b"1")])
    pairs = pairs_of(tmp_path)
    assert [pairs[0, i][1] for i in range(4)] == [["one"], ["two", "a title is empty"], ["three"], ["4", "four"]]
    assert len(pairs) == 4 and len(pairs.damage) == 1 and "1 pictures or captions" in pairs.damage[0]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_kind_of_tar_header_is_read(tmp_path, form):
    key = "a folder with a long name/" * 4 + "x" * 90 + "y" * (form != tarfile.USTAR_FORMAT) * 80
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for i in range(3):
            for suffix, content in (("jpg", jpeg((10 + i, 30))), ("txt", f"text {i}".encode())):
                info = tarfile.TarInfo(f"{key}{i}.{suffix}")
                info.size, info.mtime = len(content), 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(content))
    assert contents(pairs_of(tmp_path)) == [(i, [f"text {i}"]) for i in range(3)]


@pytest.mark.peers
def test_webdatasets_own_shards_are_read(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:  # img2dataset's writer
        for i in range(5):
            writer.write({"__key__": f"{i:09d}", "jpg": jpeg((10 + i, 30)), "txt": f"text {i}",
                          "json": dict(caption=f"text {i}", status="success")})
    assert contents(pairs_of(tmp_path)) == [(i, [f"text {i}"]) for i in range(5)]


def write_table(folder, suffix, rows, columns=("image", "title", "description")):
    path = folder / f"table{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row))) + "\n" for row in rows), "utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            if suffix == ".csv":
                csv.writer(file).writerows([columns, *rows])
            else:
                file.writelines("\t".join(row) + "\n" for row in [columns, *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_are_read_in_place(tmp_path, suffix):
    """Captions with quotes, commas and (CSV, JSONL) line ends; the second picture is missing: a bad pair, no end."""
    (tmp_path / "images").mkdir()
    for i in (0, 2, 3):
        (tmp_path / f"images/{i}.jpg").write_bytes(jpeg((10 + i, 30)))
    titles = ['say "cheese", please', "gone", "" if suffix == ".tsv" else 'two\n"lines"', "größe ✓"]
    path = write_table(tmp_path, suffix, [(f"{i}.jpg", title, f"number {i}") for i, title in enumerate(titles)])
    pairs = pairs_of(path)
    assert len(pairs) == 4 and len(pairs_of(tmp_path)) == 4  # the folder's only table
    for i in (0, 2, 3):
        content, captions = pairs[0, i]
        assert data.decode(content).width == 10 + i
        assert captions == [text for text in (titles[i], f"number {i}") if text]
    with pytest.raises(data.BAD_IMAGE):
        pairs[0, 1]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_of_many_records(tmp_path, suffix):
    """More than the hundred whose pictures are looked for first."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.jpg").write_bytes(jpeg((10, 30)))
    path = write_table(tmp_path, suffix, [("0.jpg", f"title {i}", "") for i in range(150)])
    assert contents(pairs_of(path)) == [(0, [f"title {i}"]) for i in range(150)]


def test_tables_that_are_wrong_are_one_sentence(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "table.TXT").write_text("image\tcaption\n")
    with pytest.raises(ValueError, match="is no table: wanted is"):
        pairs_of(tmp_path / "table.TXT")
    for columns in (("image", "words"), ("photo", "caption")):
        with pytest.raises(ValueError, match="must name the columns"):
            pairs_of(write_table(tmp_path, ".csv", [("0.jpg", "x")], columns))
    with pytest.raises(FileNotFoundError, match=r"none of its first 1 pictures \(nowhere.jpg"):
        pairs_of(write_table(tmp_path, ".tsv", [("nowhere.jpg", "x", "y")]))
    (tmp_path / "table.csv").write_text('image,title\n0.jpg,"never closed' + " and on" * 200_000)
    with pytest.raises(ValueError, match="cannot read the record '0.jpg,\"never closed"):
        pairs_of(tmp_path / "table.csv")
    (tmp_path / "table.tsv").write_text("image\ttitle\n")
    with pytest.raises(FileNotFoundError, match="no record that names a picture"):
        pairs_of(tmp_path / "table.tsv")
    with pytest.raises(ValueError, match="2 tables in .*: name the one"):
        pairs_of(tmp_path)


def test_odd_records_are_bad_pairs_and_spare_the_others(tmp_path):
    """Stray quotes, blank lines, byte-order marks, windows' line ends, wrong types, endless cells, deep nesting."""
    (tmp_path / "0.jpg").write_bytes(jpeg())
    good = dict(image="0.jpg", caption="good")
    odd = ["", "{", "[1]", "7", json.dumps(dict(good, caption=7)), json.dumps(dict(good, image=["a"])), "[" * 100_000,
           json.dumps({"image": "0.jpg", "class": 3}), json.dumps({"image": "0.jpg", "class": ""}),
           json.dumps(dict(image="a.zip/0.jpg", caption="no such zip")), '{"image": "x.zip/y", ', "x" * 300,
           json.dumps(dict(good, image="x" * 300)), json.dumps(dict(good, url="http://a/b.zip/0.jpg"))]
    lines = [*odd, *[json.dumps(good)] * 3]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([json.dumps(good), *lines]).encode())
    pairs, seen = pairs_of(tmp_path / "a.jsonl"), Counter()
    for i in range(len(pairs)):
        try:
            assert pairs[0, i][1] == ["good"]
            seen["good"] += 1
        except data.BAD_IMAGE:
            seen["bad"] += 1
    assert seen == dict(good=5, bad=11) and "1 pictures are not in their zips" in pairs.damage[0]
    rows = ['0.jpg,a 5" disk'] * 2 + ["0.jpg,plain", "", '0.jpg,"two\r\nlines"', "0.jpg,end"]
    (tmp_path / "b.csv").write_bytes(("image,caption\r\n" + "\r\n".join(rows)).encode())
    assert [captions[0] for _, captions in contents(pairs_of(tmp_path / "b.csv"))] == [
        'a 5" disk', 'a 5" disk', "plain", "two\r\nlines", "end"]
    (tmp_path / "c.tsv").write_bytes(b"image\tcaption\r\n\r\n0.jpg\tone\r\n\r\n0.jpg\ttwo\r\n")
    assert [captions for _, captions in contents(pairs_of(tmp_path / "c.tsv"))] == [["one"], ["two"]]


def test_a_table_may_move_with_its_pictures_or_without(tmp_path):
    for i in range(2):
        (tmp_path / f"a/images/{i}.jpg").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"a/images/{i}.jpg").write_bytes(jpeg((10 + i, 30)))
    table = write_table(tmp_path / "a", ".tsv", [("0.jpg", "0", ""), ("1.jpg", "1", "")])
    assert contents(pairs_of(table)) == [(0, ["0"]), (1, ["1"])]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    before = (tmp_path / "b/table.tsv.index").stat().st_mtime_ns
    assert contents(pairs_of(tmp_path / "b")) == [(0, ["0"]), (1, ["1"])]
    assert (tmp_path / "b/table.tsv.index").stat().st_mtime_ns == before  # all is as it was, seen from the folder
    for i in range(2):
        (tmp_path / f"b/images/{i}.jpg").rename(tmp_path / f"b/{i}.jpg")
    assert contents(pairs_of(tmp_path / "b")) == [(0, ["0"]), (1, ["1"])]


def test_what_macos_and_folders_add_is_no_pair(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("x", "x/0.jpg"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, content in [("x/._0.jpg", b"mac"), ("x/._0.txt", b"mac"), *members(range(2)), ("x/0.txt", b"text")]:
            data.add_member(tar, name, content)
    assert [i for i, _ in contents(pairs_of(tmp_path))] == [0, 1]


def test_class_folders_become_captions(tmp_path):
    for key, count in (("n01", 3), ("grey_cat", 2)):
        (tmp_path / "set" / key).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "set" / key / f"{i}.JPEG").write_bytes(jpeg((10 + i + 10 * count, 30)))
    (tmp_path / "set/words.txt").write_text("n01\ttench, Tinca tinca\nn02\tshark\n")
    (tmp_path / "set/templates.txt").write_text("a {}\nmany {}\n")
    found = contents(pairs_of("set", root=tmp_path))
    tench = ["a tench", "many tench", "a Tinca tinca", "many Tinca tinca"]
    assert sorted(found) == [(20 + i, ["a grey cat", "many grey cat"]) for i in range(2)] + [(30 + i, tench)
                                                                                         for i in range(3)]
    (tmp_path / "set/grey_cat/9.JPEG").write_bytes(jpeg())
    assert len(pairs_of("set", root=tmp_path)) == 6  # a new picture is seen


def test_coco_captions(tmp_path):
    for folder in ("annotations", "train2017"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        (tmp_path / f"train2017/{i:012d}.jpg").write_bytes(jpeg((10 + i, 30)))
    notes = [dict(image_id=10 * i, id=k, caption=f"caption {k} of {i}") for i in range(3) for k in range(i + 1)]
    file = tmp_path / "annotations/captions_train2017.json"
    file.write_text(json.dumps(dict(info={}, annotations=notes, images=[
        dict(id=10 * i, file_name=f"{i:012d}.jpg") for i in range(3)])))
    assert contents(pairs_of(file)) == [(i, [f"caption {k} of {i}" for k in range(i + 1)]) for i in range(3)]
    for content in ("[1]", "[" * 100_000, '{"images": [], "annotations": [{}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="no COCO captions json"):
            pairs_of(file)


@pytest.fixture
def yfcc100m(tmp_path):
    """SLIP's layout: images/12/345.zip with 678.jpg.  -> folder, {line number: width - 10}"""
    widths = {0: 0, 345_999: 1, 12_345_678: 2, 12_345_679: 3, 99_999_001: 4}
    for number, i in widths.items():
        outer, _, member = data.yfcc_zip(number).partition(".zip/")
        (tmp_path / outer).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(tmp_path / f"{outer}.zip", "a", zipfile.ZIP_DEFLATED if i % 2 else 0) as file:
            file.writestr(member, jpeg((10 + i, 30)))
    assert (tmp_path / "images/12/345.zip").is_file() and data.yfcc_zip(12_345_678) == "images/12/345.zip/678.jpg"
    return tmp_path, widths


def test_slips_zips_and_pickle(yfcc100m):
    folder, widths = yfcc100m
    records = [(number, f"title {i}", "" if i == 3 else f"words {i}") for number, i in widths.items()]
    with open(folder / "yfcc15m.pkl", "wb") as file:
        pickle.dump([*records, (50_000_000, "its zip is missing", ""), (1, "not in its zip", "")], file)
    pairs = pairs_of(folder)
    assert contents(pairs) == [(i, [f"title {i}", f"words {i}"][:1 if i == 3 else 2]) for i in widths.values()]
    assert len(pairs.damage) == 1 and "2 pictures are not in their zips" in pairs.damage[0]
    (folder / "images/50").mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "images/50/000.zip", "w") as file:  # it comes later
        file.writestr("000.jpg", jpeg((17, 30)))
    assert contents(pairs_of(folder))[-1] == (7, ["its zip is missing"])


def test_slips_npy(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg((10 + i, 30)))
    for extra in (dict(image_id="{}.jpg"), dict(image_name="{}.jpg", image_id=7)):
        records = [{k: v.format(i) if k == "image_id" and len(extra) == 1 or k == "image_name" else v
                    for k, v in extra.items()} | dict(captions=[f"caption {i}"]) for i in range(3)]
        np.save(tmp_path / "cc.npy", np.array(records))
        assert contents(pairs_of(tmp_path / "cc.npy")) == [(i, [f"caption {i}"]) for i in range(3)]
    np.save(tmp_path / "cc.npy", np.arange(3))
    with pytest.raises(ValueError, match="an array of numbers"):
        pairs_of(tmp_path / "cc.npy")


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_does_not_run(tmp_path):
    for name in ("yfcc15m.pkl", "cc3m.npy"):
        evil = [(1, "title", Malice(tmp_path / "ran"))]
        if name.endswith("pkl"):
            (tmp_path / name).write_bytes(pickle.dumps(evil))
        else:
            np.save(tmp_path / name, np.array([dict(image_id="x", captions=evil)]), allow_pickle=True)
        with pytest.raises(ValueError, match="it asks for posix.system"):
            pairs_of(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "cc3m.npy", allow_pickle=True)  # the file is one that would have run
    assert (tmp_path / "ran").exists()
    scalars = [(np.int64(7), np.float32(1.5), "x"), (np.int16(-2), 3, None)]
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(scalars))
    assert data.load_plain_pickle(tmp_path / "plain.pkl") == [(7, 1.5, "x"), (-2, 3, None)]
    for module, name in (("builtins", "eval"), ("numpy", "load"), ("numpy.ctypeslib", "load_library")):
        (tmp_path / "plain.pkl").write_bytes(f"c{module}\n{name}\n.".encode())  # only names it
        with pytest.raises(pickle.UnpicklingError, match=f"it asks for {module}.{name}"):
            data.load_plain_pickle(tmp_path / "plain.pkl")


def test_find_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set 'cc3m': looked for .*cc3m.* img2dataset"):
        pairs_of("cc3m", root=tmp_path)
    write_shard(tmp_path / "cc3m/train/0.tar", members(range(2)))
    assert len(pairs_of("cc3m", root=tmp_path)) == 2


def test_braces_name_shards(tmp_path):
    for i in range(4):
        write_shard(tmp_path / f"set/{i:05d}.tar", members(range(3 * i, 3 * i + 3)))
    assert data.expand("a/{008..011}.{tar,zip}") == [f"a/{i:03d}.{end}" for i in range(8, 12) for end in ("tar", "zip")]
    pairs = pairs_of("set/{00001..00002}.tar", root=tmp_path)
    assert [i for i, _ in contents(pairs)] == list(range(3, 9))
    digest = pairs.digest()
    assert [i for i, _ in contents(pairs_of(tmp_path / "set/00003.tar"))] == [9, 10, 11]
    assert [i for i, _ in contents(pairs_of("set", root=tmp_path))] == list(range(12))  # the index grows
    assert pairs_of("set/{00001..00002}.tar", root=tmp_path).digest() == digest  # which is no other data for a run
    assert pairs_of("set/{00002..00003}.tar", root=tmp_path).digest() != digest
    with pytest.raises(FileNotFoundError, match="no data set 'set/00004.tar'"):
        pairs_of("set/{00002..00005}.tar", root=tmp_path)
    write_shard(tmp_path / "more/0.tar", members(range(20, 22)))
    assert [i for i, _ in contents(pairs_of("{set,more}", root=tmp_path))] == [*range(12), 20, 21]


def test_several_sources_with_weights(tmp_path):
    write_shard(tmp_path / "a/0.tar", members(range(6), "a"))
    write_shard(tmp_path / "b/0.tar", members(range(4), "b"))
    write_shard(tmp_path / "b/1.tar", members(range(4, 8), "b"))
    def drawn(epoch, *names):
        return Counter(captions[0] for _, captions in contents(pairs_of(*names, root=tmp_path), epoch))
    assert drawn(0, "a", "b") == {f"a {i}": 1 for i in range(6)} | {f"b {i}": 1 for i in range(8)}
    assert drawn(3, "a:2", "b:3") == {f"a {i}": 2 for i in range(6)} | {f"b {i}": 3 for i in range(8)}
    halves = [drawn(epoch, "a:0.5", "b") for epoch in range(4)]
    assert all(sum(half.values()) == 11 for half in halves)
    assert halves[0] + halves[1] == halves[2] + halves[3] == {f"a {i}": 1 for i in range(6)} | {f"b {i}": 2
                                                                                            for i in range(8)}
    for i in range(6):
        write_shard(tmp_path / f"c/{i}.tar", members(range(4 * i, 4 * i + 4), "c"))
    often = sum((drawn(epoch, "c:0.1") for epoch in range(12 * 7)), Counter())  # 2 of 24 pairs an epoch
    assert often == {f"c {i}": 7 for i in range(24)}
    write_shard(tmp_path / "d:2/0.tar", members(range(3), "d"))
    assert len(pairs_of("d:2", root=tmp_path)) == 3 and len(pairs_of("d:2:2", root=tmp_path)) == 6
    for weight in ("0", "-1", "1000"):
        with pytest.raises(ValueError, match="weight"):
            pairs_of(f"a:{weight}", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="no pairs in a:0.01"):
        pairs_of("a:0.01", root=tmp_path)


# ---------------------------------------------------------------- the index

def test_the_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path, monkeypatch):
    for i in range(3):
        write_shard(tmp_path / f"{i}.tar", members(range(4 * i, 4 * i + 4)))
    read = []
    scan = data._scan_shard
    monkeypatch.setattr(data, "_scan_shard", lambda folder, name: read.append(name) or scan(folder, name))
    assert len(pairs_of(tmp_path)) == 12 and read == ["0.tar", "1.tar", "2.tar"]
    assert len(pairs_of(tmp_path)) == 12 and len(read) == 3 and (tmp_path / "pairs.index").is_file()
    write_shard(tmp_path / "1.tar", members(range(20, 25)))
    write_shard(tmp_path / "3.tar", members(range(30, 32)))
    (tmp_path / "0.tar").unlink()
    assert [i for i, _ in contents(pairs_of(tmp_path))] == [20, 21, 22, 23, 24, 8, 9, 10, 11, 30, 31]
    assert sorted(read[3:]) == ["1.tar", "3.tar"]
    whole = (tmp_path / "pairs.index").read_bytes()
    older = whole.replace(b'"version": 1', b'"version": 0')
    for part in (whole[:5], whole[:len(whole) // 2], b"{}\n", b"\x00" * 99, older):
        (tmp_path / "pairs.index").write_bytes(part)  # cut off, or of another version
        assert len(pairs_of(tmp_path)) == 11 and len((tmp_path / "pairs.index").read_bytes()) == len(whole)


def test_a_read_only_folder_is_indexed_in_the_users_cache(tmp_path, monkeypatch):
    write_shard(tmp_path / "data/0.tar", members(range(3)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data.os, "access", lambda path, mode: False)  # the tests may run as root, whom nothing stops
    assert len(pairs_of(tmp_path / "data")) == 3
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["0.tar"]
    monkeypatch.setattr(data, "_scan_shard", None)  # found there again
    assert len(pairs_of(tmp_path / "data")) == 3 and len(list((tmp_path / "cache/maskclip").iterdir())) == 1


def test_pairs_go_to_processes_that_start_afresh(tmp_path):
    write_shard(tmp_path / "0.tar", members(range(5)))
    pairs = pairs_of(tmp_path)
    content = pickle.dumps(pairs)
    assert len(content) < 4000 and contents(pickle.loads(content)) == contents(pairs)
    samples = samples_of(pairs, ("images", "text"))
    loader = torch.utils.data.DataLoader(samples, 2, sampler=[(0, i) for i in range(4)], collate_fn=samples.collate,
                                         num_workers=1, multiprocessing_context="spawn")
    assert np.array_equal(next(iter(loader))["images"], [samples[0, i]["images"] for i in (0, 1)])
    write_shard(tmp_path / "1.tar", members(range(5)))
    pairs_of(tmp_path)
    with pytest.raises(OSError, match="was written anew by another program"):
        pickle.loads(content)


def test_runs_on_different_shards_of_a_folder_may_index_at_once(tmp_path):
    """Each opens its half while the other writes the index of the same folder."""
    for i in range(8):
        write_shard(tmp_path / f"{i}.tar", members(range(4 * i, 4 * i + 4)))
    code = ("import data, os, sys\nfor _ in range(30):\n"
            "    names = [sys.argv[1] + '/{' + sys.argv[2] + '}.tar']\n    assert len(data.Pairs(names)) == 16\n"
            "    os.path.exists(sys.argv[1] + '/pairs.index') and os.truncate(sys.argv[1] + '/pairs.index', 50)")
    runs = [subprocess.Popen([sys.executable, "-c", code, tmp_path, half], stderr=subprocess.PIPE, text=True)
            for half in ("0..3", "4..7")]
    assert [(run.communicate(timeout=60)[1], run.returncode) for run in runs] == [("", 0)] * 2


def test_a_shard_cut_in_half_gives_its_first_half(tmp_path):
    write_shard(tmp_path / "0.tar", [m for i in range(20) for m in ((f"{i}.jpg", jpeg()), (f"{i}.txt", b"text"))])
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:20000])
    for _ in range(2):  # read, and from the index
        pairs = pairs_of(tmp_path)
        assert 5 < len(pairs) < 15 and "is damaged" in pairs.damage[0]
        assert all(captions == ["text"] for _, captions in contents(pairs))


@pytest.mark.parametrize("end", ["between members", "in a header", "spoilt header"])
def test_a_shard_that_ends_early_without_an_error_is_named_too(tmp_path, end):
    write_shard(tmp_path / "0.tar", members(range(6)))
    content = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        place = tar.getmembers()[6].offset
    assert pairs_of(tmp_path).damage == []
    spoilt = content[:place] + b"\xff" * 512 + content[place + 512:]
    (tmp_path / "0.tar").write_bytes({"between members": content[:place], "in a header": content[:place + 100],
                                      "spoilt header": spoilt}[end])
    pairs = pairs_of(tmp_path)
    assert len(pairs) == 3 and "0.tar is damaged" in pairs.damage[0]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: (p / "0.tar").write_bytes(b"not a tar" * 200),
                                  lambda p: (p / "0.tar").write_bytes(b""),
                                  lambda p: (p / "0.tar").symlink_to("nowhere.tar"),
                                  lambda p: write_shard(p / "0.tar", [("a.jpg", jpeg())]),
                                  lambda p: (p / "set.tsv").write_text("image\tcaption\n"),
                                  lambda p: (p / "class").mkdir()])
def test_a_folder_without_pairs_is_one_sentence(tmp_path, make):
    make(tmp_path)
    with pytest.raises(FileNotFoundError, match="no pairs in|no data set"):
        pairs_of(tmp_path)


# ---------------------------------------------------------------- bad pairs while training

def samples_of(pairs, needs=("images", "views", "text", "mask", "mlm"), **changes):
    config = SimpleNamespace(**dict(seed=0, crop_min=0.7, mask="block", mask_ratio=0.75, mlm_ratio=0.2,
                                    compile=False) | changes)
    shape = SimpleNamespace(image_size=32, grid=4, context_length=12)
    tokenizer = Tokenizer.train(["a red star above a blue ring"] * 2, 540)
    return data.Samples(pairs, tokenizer, needs, config, shape)


def test_a_json_without_a_caption_is_a_bad_pair(tmp_path):
    raw = [b"{}", b'{"caption": null}', b'["caption"]', b"{", b'{"caption": 7}', b'{"caption": " ", "title": ""}']
    write_shard(tmp_path / "0.tar", [m for i, r in enumerate(raw) for m in ((f"{i}.jpg", jpeg()), (f"{i}.json", r))])
    pairs = pairs_of(tmp_path)
    for i in range(len(raw)):
        with pytest.raises(ValueError):
            pairs[0, i]
    assert list(pairs.captions(9)) == []


@pytest.mark.parametrize("kind", [*BROKEN, "caption"])
def test_a_bad_pair_is_replaced_by_the_same_one_each_time_and_named(tmp_path, kind):
    bad = [("bad.jpg", BROKEN.get(kind, jpeg())), ("bad.txt", b" \n" if kind == "caption" else b"bad")]
    write_shard(tmp_path / "0.tar", bad + [m for i in range(9) for m in ((f"{i}.jpg", jpeg()), (f"{i}.txt", b"good"))])
    samples = samples_of(pairs_of(tmp_path))
    first, again, good = samples[0, 0], samples[0, 0], samples[0, 1]
    assert len(first["bad"]) == 1 and "0.tar at byte" in first["bad"][0] and good["bad"] == []
    assert all(np.array_equal(first[name], again[name]) for name in ("images", "views", "caption"))
    assert first["caption"] == "good"


def test_captions_of_any_length_and_bytes(tmp_path):
    long = " ".join(f"word{i}" for i in range(10_000))
    write_shard(tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.txt", long.encode()), ("b.jpg", jpeg()),
                                     ("b.txt", b"\xe9 \xff au")])
    samples = samples_of(pairs_of(tmp_path))
    tokens = samples.collate([samples[0, 0], samples[0, 1]])["tokens"]
    assert tokens.shape == (2, 12) and tokens[0, -1] == samples.tokenizer.eot and samples[0, 0]["bad"] == []
    assert "au" in samples.tokenizer.decode(tokens[1, 1:-1].tolist()) and samples[0, 1]["bad"] == []


@pytest.mark.parametrize("what", ["vanishes", "shrinks"])
def test_a_shard_that_goes_during_a_run_is_a_bad_pair(tmp_path, what):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", members(range(10 * number, 10 * number + 10)))
    samples = samples_of(pairs_of(tmp_path))
    if what == "vanishes":
        (tmp_path / "1.tar").unlink()
    else:
        os.truncate(tmp_path / "1.tar", 4000)
    found = [samples[0, i] for i in range(20)]
    assert all(sample["bad"] == [] for sample in found[:10])
    words = "No such file" if what == "vanishes" else "shorter than it was"
    assert all(any("1.tar" in line and words in line for line in sample["bad"]) for sample in found[-5:])
    assert all(sample["images"].shape == (32, 32, 3) for sample in found)


def test_one_of_several_captions_is_drawn_at_each_visit(tmp_path):
    fields = json.dumps(dict(title="red", description="blue", caption="")).encode()
    write_shard(tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.json", fields)])
    samples = samples_of(pairs_of(tmp_path), ("images", "text"))
    drawn = [samples[epoch, 0]["caption"] for epoch in range(60)]
    assert 15 < Counter(drawn)["red"] < 45 and set(drawn) == {"red", "blue"}
    assert drawn[:9] == [samples[epoch, 0]["caption"] for epoch in range(9)]


def test_nothing_but_bad_pairs_ends_with_a_sentence(tmp_path):
    write_shard(tmp_path / "0.tar", [m for i in range(3) for m in ((f"{i}.jpg", b"x"), (f"{i}.txt", b"a"))])
    with pytest.raises(ValueError, match="20 bad pairs in a row"):
        samples_of(pairs_of(tmp_path))[0, 0]


def test_a_share_that_is_no_share_is_refused():
    for ratio in (75, -0.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            data.block_mask((8, 8), ratio, np.random.default_rng(0))
        with pytest.raises(ValueError, match="from 0 to 1"):
            data.random_mask(64, ratio, np.random.default_rng(0))


# ---------------------------------------------------------------- order and batches

@pytest.mark.parametrize("sizes,window", [([50], 10), ([7, 0, 13, 1, 9, 20], 15), ([5] * 40, 30), ([1] * 30, 1),
                                          ([100, 3, 3, 100], 20)])
def test_an_epoch_holds_each_pair_once_and_mixes_within_its_window(sizes, window):
    order, n = data.Order(sizes, 3, window), sum(sizes)
    epochs = [order(epoch, 0, n).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(n))
    assert order(0, 0, n).tolist() == epochs[0] != data.Order(sizes, 4, window)(0, 0, n).tolist()
    for start, stop in ((0, 1), (3, 17), (n - 2, n), (n // 2, n // 2 + 1), (5, 5 + window)):  # any place, alone
        assert data.Order(sizes, 3, window)(1, start, min(n, stop)).tolist() == epochs[1][start:stop]
    part = np.repeat(np.arange(len(sizes)), sizes)[epochs[0]]
    group = window + 2 * max(sizes)  # a part is never spread over more places than its group has
    assert all(np.ptp(np.flatnonzero(part == p)) < group for p in set(part.tolist()))


def test_the_order_is_random():
    """Over many seeds each pair stands at each place equally often, and parts are mixed with each other."""
    sizes, n, often = [6, 2, 4], 12, np.zeros((12, 12))
    for seed in range(3000):
        often[np.arange(n), data.Order(sizes, seed, 100)(0, 0, n)] += 1
    assert often.min() > 250 - 5 * 16 and often.max() < 250 + 5 * 16  # binomial: 250 +- 15
    firsts = Counter(int(data.Order([4] * 9, seed, 8)(0, 0, 1)[0]) // 4 for seed in range(1800))
    assert min(firsts.values()) > 130 and len(firsts) == 9


def test_global_batches_are_the_same_for_any_number_of_ranks_and_from_any_step():
    def keys(first=0, last=12, world=1):
        ranks = [list(data.GlobalBatches(data.Order([20, 9, 21], 5, 16), 12, first, last, rank, world))
                 for rank in range(world)]
        return [sum(parts, []) for parts in zip(*ranks)]
    whole = keys()
    assert whole == keys(world=2) == keys(world=4) and keys(6) == whole[6:] == keys(6, world=3)
    stream = sum(whole, [])
    assert len(stream) == 144 and all(len(batch) == 12 for batch in whole)
    for epoch in range(2):  # one after the other, each pair once
        assert [e for e, _ in stream[50 * epoch:50 * epoch + 50]] == [epoch] * 50
        assert sorted(i for _, i in stream[50 * epoch:50 * epoch + 50]) == list(range(50))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_the_same_for_any_workers_ranks_and_restarts(tmp_path):
    """What training reads, pixels and masks and tokens: 0, 1, 3 and 16 workers, 1, 2, 4 ranks, from the middle."""
    write_shard(tmp_path / "0.tar", members(range(21)))  # one shard, many workers
    pairs = pairs_of(tmp_path)
    samples = samples_of(pairs)

    def batches(workers=0, first=0, last=8, world=1):
        ranks = [list(torch.utils.data.DataLoader(
            samples, batch_sampler=data.GlobalBatches(data.Order(pairs.sizes, 1), 8, first, last, rank, world),
            collate_fn=samples.collate, num_workers=workers)) for rank in range(world)]
        return [{name: sum((part[name].tolist() for part in parts), []) for name in ("images", "views", "ids_hide")}
                | dict(tokens=sum(([[t for t in row if t] for row in part["tokens"].tolist()] for part in parts), []))
                for parts in zip(*ranks)]
    whole = batches()
    assert len(whole) == 8 and whole[0] != whole[1]
    for how in (dict(workers=1), dict(workers=3), dict(workers=16), dict(world=2), dict(world=4)):
        assert batches(**how) == whole, how
    assert batches(first=5, world=2, workers=1) == whole[5:]


def test_a_batch_is_the_receivers_own(tmp_path):
    """Workers fill the same memory again and again: what has been received, or waits to be, must not change."""
    write_shard(tmp_path / "0.tar", members(range(12)))
    samples = samples_of(pairs_of(tmp_path), ("images", "text", "mask"))
    order = data.Order([12], 0)
    def loader(workers):
        return torch.utils.data.DataLoader(samples, batch_sampler=data.GlobalBatches(order, 3, 0, 12),
                                           collate_fn=samples.collate, num_workers=workers)
    got = []
    for batch in loader(1):
        got.append(batch)
        time.sleep(0.03)  # the worker is ahead
    for ours, alone in zip(got, loader(0), strict=True):
        assert all(torch.equal(ours[name], alone[name]) for name in ("images", "ids_keep", "ids_hide"))


def test_a_batch_holds_what_the_methods_need(tmp_path):
    write_shard(tmp_path / "0.tar", [m for i in range(4) for m in (
        (f"{i}.jpg", jpeg()), (f"{i}.txt", " ".join(["red star"] * (1 + 9 * (i == 3))).encode()))])
    samples = samples_of(pairs_of(tmp_path))
    batch = samples.collate([samples[0, i] for i in range(4)])
    assert batch["images"].shape == (4, 32, 32, 3) and batch["images"].dtype == torch.uint8
    assert batch["views"].shape == (4, 2, 32, 32, 3)
    tok, tokens = samples.tokenizer, batch["tokens"]
    assert tokens.shape == (4, 12)  # as long as the longest, cut to the context length, which ends in end-of-text
    assert tokens[:, 0].tolist() == [tok.sot] * 4 and tokens[3, 11] == tok.eot
    assert batch["ids_hide"].shape == (4, 12) and batch["ids_keep"].shape == (4, 4)
    for hide, keep in zip(batch["ids_hide"].tolist(), batch["ids_keep"].tolist()):
        assert sorted(hide + keep) == list(range(16))
    chosen = batch["mlm_tokens"] != tokens
    assert (batch["mlm_tokens"][chosen] == tok.mask).all()
    assert torch.equal(chosen.flatten().nonzero()[:, 0], batch["mlm_ids"])
    assert torch.equal(tokens.flatten()[batch["mlm_ids"]], batch["mlm_targets"])
    assert not ((tokens == tok.sot) | (tokens == tok.eot) | (tokens == 0))[chosen].any()
    inner = (tokens > 0).sum(1) - 2
    assert chosen.sum(1).tolist() == [max(1, round(0.2 * n)) for n in inner.tolist()]


# ---------------------------------------------------------------- python data.py

@pytest.fixture
def run(capsys):
    """The command line -> what it prints; with rc=1 the sentence that it ends with."""
    def call(*args, rc=0):
        try:
            data.main(list(map(str, args)))
        except SystemExit as end:
            assert rc, end.code
            return f"{end.code} {capsys.readouterr().err}"
        assert not rc
        return capsys.readouterr().out
    return call


def test_check_lists_what_is_bad_and_training_skips_it(tmp_path, run):
    write_shard(tmp_path / "0.tar", members(range(5)))
    write_shard(tmp_path / "1.tar", [("x.jpg", BROKEN["truncated"]), ("x.txt", b"x"), *members(range(5, 7)),
                                     ("y.jpg", jpeg()), ("y.txt", b" ")])
    out = run("check", tmp_path)
    assert "2 of 9 pairs are bad; others take their places" in out and "1.tar: empty caption" in out
    assert "truncated" in out and "_io.BytesIO" not in out
    before, samples = pairs_of(tmp_path), samples_of(pairs_of(tmp_path))
    assert len(before) == 9 and len((tmp_path / "pairs.skip").read_text().splitlines()) == 2  # the order stays
    for i in range(9):
        assert samples[0, i]["bad"] == []  # replaced, and not counted again
        if i in (5, 8):
            with pytest.raises(data.Skipped):
                before[0, i]
    assert "2 of 9 pairs are bad" in run("check", tmp_path)  # looks at all of them again
    write_shard(tmp_path / "1.tar", [("x.jpg", jpeg()), ("x.txt", b"x"), *members(range(5, 7)), *members([8])])
    after = pairs_of(tmp_path)
    assert after.sources[0].skip == {} and len(contents(after)) == 9  # mended: the list is of another file
    write_shard(tmp_path / "2/0.tar", [("x.jpg", b"x"), ("x.txt", b"x")])
    assert "all of the 1 pairs of" in run("check", tmp_path / "2", rc=1) and not (tmp_path / "2/pairs.skip").exists()


def test_check_keeps_what_it_knows_of_other_shards_and_forgets_what_is_mended(tmp_path, run):
    for i in range(3):
        write_shard(tmp_path / f"{i}.tar", [("x.jpg", b"x"), ("x.txt", b"x"), *members(range(3))])
    assert "2 of 8 pairs are bad" in run("check", tmp_path / "0.tar", tmp_path / "1.tar")
    assert "1 of 4 pairs are bad" in run("check", tmp_path / "2.tar")
    pairs = pairs_of(tmp_path)
    assert len(contents_of_good(pairs)) == 9 and sum(map(len, pairs.sources[0].skip.values())) == 3
    (tmp_path / "t").mkdir()
    (tmp_path / "t/0.jpg").write_bytes(jpeg())
    table = write_table(tmp_path / "t", ".tsv", [("0.jpg", "a", ""), ("1.jpg", "b", "")])
    assert "1 of 2 pairs are bad" in run("check", table) and len(contents_of_good(pairs_of(table))) == 1
    (tmp_path / "t/1.jpg").write_bytes(jpeg())
    assert "0 of 2 pairs are bad" in run("check", table) and len(contents(pairs_of(table))) == 2


def test_a_long_skip_list_is_no_reason_to_stop(tmp_path, run):
    write_shard(tmp_path / "0.tar", [*members([0]), *[m for i in range(40) for m in ((f"x{i}.jpg", b"x"),
                                                                                    (f"x{i}.txt", b"x"))]])
    run("check", tmp_path)
    samples = samples_of(pairs_of(tmp_path), ("images", "text"))
    assert all(samples[0, i]["caption"] == "text 0" and samples[0, i]["bad"] == [] for i in range(41))


def test_folders_that_are_links(tmp_path):
    (tmp_path / "far/notes").mkdir(parents=True)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/annotations").symlink_to(tmp_path / "far/notes")
    (tmp_path / "coco/images").mkdir()
    (tmp_path / "coco/images/0.jpg").write_bytes(jpeg())
    write_table(tmp_path / "coco/annotations", ".tsv", [("0.jpg", "a", "")])
    assert len(contents(pairs_of(tmp_path / "coco/annotations/table.tsv"))) == 1


def test_names_with_tabs_and_odd_bytes(tmp_path, run):
    folder = tmp_path / "a\tb ünï\n"
    write_shard(folder / "x\ty.tar", [("x.jpg", b"x"), ("x.txt", b"x"), *members(range(2))])
    run("check", folder)
    assert [i for i, _ in contents_of_good(pairs_of(folder))] == [0, 1]
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "set" / odd).mkdir(parents=True)
    (tmp_path / "set" / odd / "line\nend.jpg").write_bytes(jpeg())
    assert len(contents(pairs_of(tmp_path / "set"))) == 1


def contents_of_good(pairs):
    found = []
    for i in range(len(pairs)):
        try:
            content, captions = pairs[0, i]
            found.append((data.decode(content).width - 10, captions))
        except data.Skipped:
            pass
    return found


def test_check_of_a_table(tmp_path, run):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "1.jpg").write_bytes(b"spoilt")
    rows = [("0.jpg", "a", ""), ("1.jpg", "b", ""), ("2.jpg", "c", ""), ("0.jpg", "", "")]
    table = write_table(tmp_path, ".tsv", rows)
    assert "3 of 4 pairs are bad" in run("check", table)
    assert [captions for _, captions in contents_of_good(pairs_of(table))] == [["a"]]


def test_pack_writes_shards_from_any_source_and_goes_on_where_it_stopped(tmp_path, run):
    source = tmp_path / "source"
    source.mkdir()
    large = left_red_right_blue(100, 300)
    for i in range(7):
        (source / f"{i}.png").write_bytes(encoded(noise(100 + i, 60) if i else large, "PNG"))
    (source / "7.gif").write_bytes(encoded(noise(30, 20), "GIF"))
    (source / "8.jpg").write_bytes(b"spoilt")
    rows = [(f"{i}.png", f"title {i}", f"words {i}" * (i % 2)) for i in range(7)]
    write_table(source, ".csv", [*rows, ("7.gif", "seven", ""), ("8.jpg", "eight", "")])
    command = ("pack", source, "--out", tmp_path / "out", "--shard-size", 4, "--size", 64)
    out = run(*command)
    assert "1 pairs bad" in out and "left out" in out and "8.jpg" not in out
    pairs, shards = pairs_of(tmp_path / "out"), sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in shards] == ["00000.tar", "00001.tar"] + ["00002.tar"]
    found = [pairs[0, i] for i in range(len(pairs))]
    assert [captions for _, captions in found] == [
        [f"title {i}", f"words {i}"] if i % 2 else [f"title {i}"] for i in range(7)] + [["seven"]]
    assert [data.decode(content).size for content, _ in found] == [
        (64, 192), *((100 + i, 60) for i in range(1, 7)), (30, 20)]
    assert found[1][0] == (source / "1.png").read_bytes()  # small enough: its own bytes
    resized = np.array(data.decode(found[0][0])).astype(float)
    exact = np.array(large.resize((64, 192), Image.BICUBIC)).astype(float)
    assert np.abs(resized - exact).mean() < 3  # once through JPEG
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    run(*command)
    assert [path.stat().st_mtime_ns for path in shards][::2] == times[::2] and len(pairs_of(tmp_path / "out")) == 8
    assert "packed from other files or in another way" in run(*command[:-1], 32, rc=1)
    (source / "table.csv").write_text((source / "table.csv").read_text().replace("seven", "another"))
    assert "packed from other files or in another way" in run(*command, rc=1)
    assert "not packed by this program" in run("pack", source, "--out", source, rc=1)


def test_pack_copies_shards_whole(tmp_path, run):
    write_shard(tmp_path / "in/0.tar", members(range(5)))
    run("pack", tmp_path / "in", "--out", tmp_path / "out")
    before, after = pairs_of(tmp_path / "in"), pairs_of(tmp_path / "out")
    assert [before[0, i] for i in range(5)] == [after[0, i] for i in range(5)]


def test_pack_that_is_interrupted_ends_soon_and_goes_on(tmp_path, run):
    picture = encoded(Image.new("RGB", (1200, 1200)), "PNG")  # a small file, and some 30 ms to resize
    write_shard(tmp_path / "in/0.tar", [m for i in range(400) for m in ((f"{i}.png", picture), (f"{i}.txt", b"text"))])
    command = [sys.executable, "data.py", "pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size", "200"]
    started = subprocess.Popen([*command, "--shard-size", "50"], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while len(list((tmp_path / "out").glob("0*.tar"))) < 2:
        assert started.poll() is None
        time.sleep(0.05)
    assert "not packed to the end" in pairs_of(tmp_path / "out").damage[0]
    os.killpg(started.pid, signal.SIGINT)
    error = started.communicate(timeout=30)[1]
    assert started.returncode == 1 and "interrupted; the same command goes on" in error and "Traceback" not in error
    whole = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*.tar")}
    assert 2 <= len(whole) < 8
    run(*command[2:], "--shard-size", "50")
    assert len(pairs_of(tmp_path / "out")) == 400 and pairs_of(tmp_path / "out").damage == []
    assert not list((tmp_path / "out").glob("*partial*"))
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in whole.items())


@pytest.mark.parametrize("arguments,sentence", [
    (["pack", "X", "--out", "O", "--shard-size", "0"], "0 is less than 1"),
    (["pack", "X", "--out", "O", "--size", "-5"], "-5 is less than 1"), (["pack", "X"], "required: --out"),
    (["show", "X", "--out", "sheet.tar"], "must be a file NAME.png"), (["stats", "X"], "no data set 'X'"),
    (["yfcc", "a", "b", "--out", "data.py"], "data.py exists"), (["yfcc", "a", "b", "--out", "c"], "No such file"),
    (["mend", "X"], "invalid choice")])
def test_data_answers_bad_input_with_one_sentence(arguments, sentence, run):
    assert sentence in run(*arguments, rc=1)


def test_show_draws_pictures_over_their_captions(tmp_path, run):
    write_shard(tmp_path / "0.tar", [*members(range(3)), ("x.jpg", b"spoilt"), ("x.txt", b"x")])
    run("show", tmp_path, "--out", tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    colour = np.array((90, 30, 200))
    assert sheet.shape == (1176, 1392, 3)
    tiles = sheet.reshape(4, 294, 6, 232, 3).swapaxes(1, 2).reshape(24, 294, 232, 3)
    drawn = [(np.abs(tile[6:226, 6:226].astype(int) - colour).max(-1) < 12).all() for tile in tiles]
    assert 12 <= sum(drawn) < 24  # a quarter is spoilt
    assert all((tile[228:] < 100).all(-1).sum() > 20 for tile in tiles)  # letters
    assert "error: no data set" in run("show", tmp_path / "no", "--out", tmp_path / "s.png", rc=1)


def test_yfcc_cleans_captions_as_slip(yfcc100m, run):
    """Lines of the true form, 25 columns; made-up values, URL-quoted as Flickr's."""
    folder, widths = yfcc100m
    cases = {0: ("Old+boat%2C+%3Cb%3ELake%3C%2Fb%3E", "see+http%3A%2F%2Fx.org%2Fa+or+www.y.org+there", "Old boat, Lake",
                 "see or there"),
             345_999: ("%3Ca+href%3D%22http%3A%2F%2Fx.org%22+rel%3D%22nofollow%22%3Etext%3C%2Fa%3E", "", "text", ""),
             12_345_678: ("http%3A%2F%2Fonly.a%2Furl", "%3Ci%3E%3C%2Fi%3E", None, None),
             12_345_679: ("tab%09and%0Aline", "1%2B1 caf%C3%A9", "tab and line", "1 1 café"),
             99_999_001: ("DSC_0001", "", "DSC_0001", "")}
    lines = []
    for number, (title, description, *_) in {**cases, 7: ("not in the list", "", 0, 0)}.items():
        cells = [str(number), str(10 ** 9 + number), f"{number:032x}", *["x"] * 22]
        cells[8:10], cells[16] = (title, description), f"http://farm1.staticflickr.com/{number}.jpg"
        lines.append("\t".join(cells) + "\n")
    (folder / "dataset.txt").write_text("".join(lines))
    (folder / "subset.tsv").write_text("".join(f"{number}\t{10 ** 9 + number}\t{number:032x}\n" for number in cases))
    assert "4 pictures with captions; 1 had none" in run(
        "yfcc", folder / "subset.tsv", folder / "dataset.txt", "--out", folder / "yfcc15m.tsv")
    (folder / "subset.tsv").unlink()
    wanted = [(widths[n], [text for text in case[2:] if text]) for n, case in cases.items() if case[2] is not None]
    pairs = pairs_of(folder)
    assert contents(pairs) == wanted
    assert "http://farm1.staticflickr.com/345999.jpg" in (folder / "yfcc15m.tsv").read_text()
    import bz2
    (folder / "dataset.txt.bz2").write_bytes(bz2.compress((folder / "dataset.txt").read_bytes()))
    (folder / "subset.txt").write_text("".join(f"{number}\t1\t2\n" for number in cases))
    run("yfcc", folder / "subset.txt", folder / "dataset.txt.bz2", "--hashed", "--out", folder / "hashed.tsv")
    assert (folder / "hashed.tsv").read_text("utf-8").splitlines()[1].startswith(f"000/000/{0:032x}.jpg\thttp")
    lines[0] = lines[0].replace("\tx", "", 1)
    (folder / "dataset.txt").write_text("".join(lines))
    assert "line 0 has 24 columns, not 25" in run("yfcc", folder / "subset.txt", folder / "dataset.txt", "--out",
                                                   folder / "no.tsv", rc=1)
    (folder / "subset.txt").write_text("6985418911\tx\n")  # an older table's photo identifier
    assert "subset.txt, line 1: wanted is a line's number" in run("yfcc", folder / "subset.txt", folder / "dataset.txt",
                                                                  "--out", folder / "no.tsv", rc=1)
    (folder / "cut.bz2").write_bytes((folder / "dataset.txt.bz2").read_bytes()[:-20])
    assert "cut.bz2 is cut off" in run("yfcc", folder / "cut.bz2", folder / "dataset.txt", "--out", folder / "no.tsv",
                                       rc=1)
    assert not (folder / "no.tsv").exists()


@pytest.mark.parametrize("caption,length", [("a", 8), ("a red star", 8), ("a red star above a blue ring and a", 12)])
def test_compiled_blocks_see_few_lengths_of_text(caption, length):
    """Multiples of 8, or the context length (12); the rest of a batch is that of the shorter text."""
    def batch(**changes):
        samples = samples_of([], needs=("text", "mlm"), **changes)
        return samples.tokenizer, samples.collate([dict(caption=caption, bad=[], rng=np.random.default_rng(0))] * 3)
    (tok, longer), (_, plain) = batch(compile=True), batch()
    end = (plain["tokens"] == tok.eot).nonzero()[0, 1] + 1
    assert longer["tokens"].shape == (3, length) and plain["tokens"].size(1) == end
    for name in ("tokens", "mlm_tokens"):
        assert torch.equal(longer[name][:, :end], plain[name]) and not longer[name][:, end:].any()
    assert torch.equal(longer["tokens"].flatten()[longer["mlm_ids"]], longer["mlm_targets"])
    assert torch.equal(longer["mlm_targets"], plain["mlm_targets"])


def test_stats_counts_tokens_and_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.Tokenizer, "clip", classmethod(lambda cls: Tokenizer.train(["some words"], 520)))
    write_shard(tmp_path / "0.tar", [*members(range(9)), ("x.jpg", b"spoilt"), ("x.txt", b"x")])
    data.main(["stats", str(tmp_path)])
    out = capsys.readouterr().out
    assert "10 pairs in 1 parts" in out and "1 pairs are bad" in out
    assert "width".ljust(31) + "".join(f"{v:>10}" for v in (10, 10, 14, 18, 18)) in out


# ---------------------------------------------------------------- evaluation sets

def test_masked_words_are_a_random_share_of_those_between_the_ends():
    """Each as often as the others, never an end or padding; "!" is id 0 in CLIP's vocabulary, as padding is."""
    eot, often = 9, torch.zeros(8)
    tokens = torch.tensor([[8, 0, 5, 0, 1, 2, 0, eot], [8, 0, eot, 0, 0, 0, 0, 0], [8, eot, 0, 0, 0, 0, 0, 0],
                           [8, 1, eot, 2, eot, 0, 0, 0]])
    for seed in range(600):
        chosen = data._mlm_mask(tokens == eot, 0.5, torch.from_numpy(np.random.default_rng(seed).random((4, 77))))
        assert chosen.sum(1).tolist() == [3, 1, 0, 1] and chosen[1, 1] and chosen[3, 1]
        often += chosen[0]
    assert not often[0] and not often[7] and 240 < often[1:7].min() and often[1:7].max() < 360


def test_class_folders_and_retrieval_sets_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no class folders"):
        data.class_folder(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat/1.jpg").write_bytes(jpeg())
    with pytest.raises(ValueError, match="no pictures of 1 classes .* dog"):
        data.class_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no karpathy.json"):
        data.karpathy(tmp_path)
    for content in ('{"images": [{"filename": "x.jpg"}]}', "[1]", "{", '{"images": [{"split": "test"}]}'):
        (tmp_path / "karpathy.json").write_text(content)
        with pytest.raises(ValueError, match="not a Karpathy json"):
            data.karpathy(tmp_path)
    for sentences in ("[]", '[{"raw": null}]', '[{"raw": 3}]'):
        (tmp_path / "karpathy.json").write_text(
            '{"images": [{"split": "test", "filename": "x", "sentences": ' + sentences + "}]}")
        with pytest.raises(ValueError, match="not a Karpathy json|no picture of split 'test' with a sentence"):
            data.karpathy(tmp_path)
    (tmp_path / "karpathy.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="no picture of split .test. with a sentence"):
        data.karpathy(tmp_path)
