"""The demo world is true, masks are exact, order does not depend on ranks, damage is counted and named."""
import hashlib
import io
import json
import tarfile
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
    pairs = data.Shards(folder / "train")
    assert len(pairs) == 120
    captions = " ".join(caption for _, caption in (pairs[i] for i in range(120)))
    assert not any(name in captions for name in data.HELD_OUT) and "red circle" in captions
    train = {hashlib.sha1(pairs._read(*row[:3])).digest() for row in pairs.rows.tolist()}
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
        out = np.array(data.random_resized_crop(image, 32, (0.3, 1.0), np.random.default_rng(seed))).astype(float)
        assert out.shape == (32, 32, 3)
        w, h = (out[:, -1, 0] - out[:, 0, 0]).mean() * 32 / 31, (out[-1, :, 1] - out[0, :, 1]).mean() * 32 / 31
        assert 0.72 < w / h < 1.39
        areas.append(w * h / (200 * 250))
    assert 0.28 < min(areas) < 0.4 and 0.8 < max(areas) <= 1.02
    extreme = data.random_resized_crop(Image.new("RGB", (1000, 3)), 32, (0.9, 1.0), np.random.default_rng(0))
    assert extreme.size == (32, 32)


def test_simclr_views_differ_and_repeat_by_seed():
    image = data.draw_scene(np.random.default_rng(0), 3, data.CLASSES)[0]
    views = [np.array(data.simclr_view(image, 64, np.random.default_rng(seed))) for seed in (1, 1, 2)]
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


# ---------------------------------------------------------------- shards and what is wrong with them

def jpeg(size=(40, 30), mode="RGB", kind="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, size, 90 if mode == "L" else (90, 30, 200, 0)[:len(mode)]).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_read_txt_and_json_and_name_what_is_left_over(tmp_path):
    write_shard(tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.txt", b"one"), ("dir/b.PNG", jpeg(kind="PNG")),
                                     ("dir/b.json", json.dumps(dict(caption="two")).encode()),
                                     ("c.webp", jpeg(kind="WEBP")), ("c.json", b"{}"), ("c.txt", b" three \n"),
                                     ("lonely.jpg", jpeg()), ("d.cls", b"1")])
    pairs = data.Shards(tmp_path)
    assert [pairs[i][1] for i in range(3)] == ["one", "two", "three"] and len(pairs) == 3
    assert pairs[0][0].size == (40, 30) and len(pairs.damage) == 1 and "1 pictures or captions" in pairs.damage[0]


def test_decode_puts_transparency_on_white_and_turns_upright():
    assert data.decode(jpeg(mode="RGBA", kind="PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert data.decode(jpeg(mode="L", kind="PNG")).getpixel((0, 0)) == (90, 90, 90)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    assert data.decode(buffer.getvalue()).size == (30, 40)


def test_a_shard_cut_in_half_gives_its_first_half(tmp_path):
    members = [member for i in range(20) for member in ((f"{i}.jpg", jpeg()), (f"{i}.txt", b"text"))]
    write_shard(tmp_path / "0.tar", members)
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:len(members) * 1000 // 2])
    pairs = data.Shards(tmp_path)
    assert 5 < len(pairs) < 15 and "is damaged" in pairs.damage[0]
    assert all(pairs[i][1] == "text" for i in range(len(pairs)))


@pytest.mark.parametrize("end", ["between members", "in a header", "spoilt header"])
def test_a_shard_that_ends_early_without_an_error_is_named_too(tmp_path, end):
    write_shard(tmp_path / "0.tar", [m for i in range(6) for m in ((f"{i}.jpg", jpeg()), (f"{i}.txt", b"text"))])
    content = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        place = tar.getmembers()[6].offset
    assert data.Shards(tmp_path).damage == []
    spoilt = content[:place] + b"\xff" * 512 + content[place + 512:]
    (tmp_path / "0.tar").write_bytes({"between members": content[:place], "in a header": content[:place + 100],
                                      "spoilt header": spoilt}[end])
    pairs = data.Shards(tmp_path)
    assert len(pairs) == 3 and "0.tar is damaged" in pairs.damage[0]


def test_a_share_that_is_no_share_is_refused():
    for ratio in (75, -0.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            data.block_mask((8, 8), ratio, np.random.default_rng(0))
        with pytest.raises(ValueError, match="from 0 to 1"):
            data.random_mask(64, ratio, np.random.default_rng(0))


@pytest.mark.parametrize("make", [lambda p: None, lambda p: (p / "0.tar").write_bytes(b"not a tar" * 200),
                                  lambda p: (p / "0.tar").write_bytes(b""),
                                  lambda p: write_shard(p / "0.tar", [("a.jpg", jpeg())])])
def test_a_folder_without_pairs_is_one_sentence(tmp_path, make):
    make(tmp_path)
    with pytest.raises(FileNotFoundError, match="no pairs in"):
        data.Shards(tmp_path)


def samples_of(pairs, **changes):
    config = SimpleNamespace(**dict(seed=0, crop_min=0.7, mask="block", mask_ratio=0.75, mlm_ratio=0.2) | changes)
    shape = SimpleNamespace(image_size=32, grid=4, context_length=12)
    tokenizer = Tokenizer.train(["a red star above a blue ring"] * 2, 540)
    return data.Samples(pairs, tokenizer, ("images", "views", "text", "mask", "mlm"), config, shape)


def test_a_json_without_a_caption_is_a_bad_pair(tmp_path):
    contents = [b"{}", b'{"caption": null}', b'["caption"]', b"{", b'{"caption": 7}', b'{"caption": " "}']
    write_shard(tmp_path / "0.tar", [m for i, content in enumerate(contents) for m in (
        (f"{i}.jpg", jpeg()), (f"{i}.json", content))])
    pairs = data.Shards(tmp_path)
    for i in range(len(contents)):
        with pytest.raises(ValueError):
            pairs[i]
    assert list(pairs.captions(9)) == []


BROKEN = dict(truncated=jpeg((200, 200))[:700], text=b"this is no picture", empty=b"")


@pytest.mark.parametrize("kind", [*BROKEN, "caption"])
def test_a_bad_pair_is_replaced_by_the_same_one_each_time_and_named(tmp_path, kind):
    members = [("bad.jpg", BROKEN.get(kind, jpeg())), ("bad.txt", b" \n" if kind == "caption" else b"bad")]
    members += [member for i in range(9) for member in ((f"{i}.jpg", jpeg()), (f"{i}.txt", b"good"))]
    write_shard(tmp_path / "0.tar", members)
    samples = samples_of(data.Shards(tmp_path))
    first, again, good = samples[0, 0], samples[0, 0], samples[0, 1]
    assert len(first["bad"]) == 1 and "0.tar at byte 512" in first["bad"][0] and good["bad"] == []
    assert all(torch.equal(first[name], again[name]) for name in first if name != "bad")
    assert samples.tokenizer.decode(first["tokens"][1:-1].tolist()).strip() == "good"


def test_nothing_but_bad_pairs_ends_with_a_sentence(tmp_path):
    write_shard(tmp_path / "0.tar", [m for i in range(3) for m in ((f"{i}.jpg", b"x"), (f"{i}.txt", b"a"))])
    with pytest.raises(ValueError, match="20 bad pairs in a row"):
        samples_of(data.Shards(tmp_path))[0, 0]


def test_find_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set 'cc3m': looked for .*cc3m.* img2dataset"):
        data.find("cc3m", tmp_path)
    write_shard(tmp_path / "cc3m/train/0.tar", [])
    assert data.find("cc3m", tmp_path) == tmp_path / "cc3m/train"


# ---------------------------------------------------------------- batches

def test_global_batches_are_the_same_for_any_number_of_ranks_and_from_any_step():
    def keys(first=0, last=9, world=1):
        ranks = [list(data.GlobalBatches(50, 12, 5, first, last, rank, world)) for rank in range(world)]
        return [sum(parts, []) for parts in zip(*ranks)]
    whole = keys()
    assert whole == keys(world=2) == keys(world=4) and keys(6) == whole[6:]
    for epoch in range(2):
        steps = [key for batch in whole[4 * epoch:4 * epoch + 4] for key in batch]
        assert {e for e, _ in steps} == {epoch} and len({i for _, i in steps}) == 48
    assert whole[0] != [(0, i) for i in range(12)] and [i for _, i in whole[0]] != [i for _, i in whole[4]]


def test_a_batch_holds_what_the_methods_need(tmp_path):
    write_shard(tmp_path / "0.tar", [m for i in range(4) for m in (
        (f"{i}.jpg", jpeg()), (f"{i}.txt", " ".join(["red star"] * (1 + 9 * (i == 3))).encode()))])
    samples = samples_of(data.Shards(tmp_path))
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
    (tmp_path / "karpathy.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="no picture of split 'test'"):
        data.karpathy(tmp_path)
