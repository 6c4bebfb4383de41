"""Order does not depend on ranks, masks are exact, pictures right or refused, damage is named."""
import io
import json
import os
import signal
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import write_shard
from PIL import Image

import data
from tokenizer import Tokenizer


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(size=(40, 30), mode="RGB", kind="JPEG"):
    colour = 90 if mode == "L" else (90, 30, 200, 0)[:len(mode)]
    return encoded(Image.new(mode, size, colour), kind)


def red_and_blue():
    image = Image.new("RGB", (64, 32), (220, 10, 10))
    image.paste((10, 10, 220), (32, 0, 64, 32))
    return image


def noise(width=200, height=200):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def members(numbers, text="text"):
    """Pairs whose picture is as wide as their number says."""
    for i in numbers:
        yield f"{i}.jpg", plain((10 + i, 30))
        yield f"{i}.txt", f"{text} {i}".encode()


def pairs_of(*names, root="."):
    return data.Pairs([str(name) for name in names], root)


def numbers_of(pairs):
    return [data.decode(pairs[i][0]).width - 10 for i in range(len(pairs))]


def samples_of(pairs, needs=("images", "views", "text", "mask", "mlm"), tokenizer=None, **changes):
    config = SimpleNamespace(**dict(seed=0, crop_min=0.7, mask="block", mask_ratio=0.75,
                                    mlm_ratio=0.2, compile=False) | changes)
    shape = SimpleNamespace(image_size=32, grid=4, context_length=12)
    tokenizer = tokenizer or Tokenizer.train(["a red star above a blue ring"] * 2, 540)
    return data.Samples(pairs, tokenizer, needs, config, shape)


# ---- pairs
def test_find_data_looks_under_root_and_at_the_path(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="cc3m"):
        data.find_data("cc3m", tmp_path)
    path = write_shard(tmp_path / "cc3m/train/0.tar", members(range(2)))
    write_shard(tmp_path / "cc3m/train/.1.tar", members(range(2)))
    assert data.find_data("cc3m", tmp_path) == data.find_data(str(path.parent)) == [path]
    assert data.find_data(str(path)) == data.find_data("cc3m/train/0.tar", tmp_path) == [path]
    monkeypatch.chdir(tmp_path)
    assert len(pairs_of("cc3m", root="elsewhere")) == 2


@pytest.mark.parametrize("name", ["table.csv", "a.zip", "classes/cat/0.jpg"])
def test_what_is_no_shard_is_answered_with_the_pack_command(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"content")
    first, *inner = name.split("/")
    command = f"python tools/prepare.py pack {tmp_path / first} --out"
    with pytest.raises(ValueError, match=command) as error:
        data.find_data(first, tmp_path)
    assert (inner[0] if inner else first.split(".")[1]) in str(error.value)


def test_a_folder_without_pairs_is_an_error(tmp_path):
    write_shard(tmp_path / "a/0.tar", [("a.jpg", plain())])
    (tmp_path / "b").mkdir()
    (tmp_path / "b/0.tar").write_bytes(b"not a tar" * 200)
    for name in "ab":
        with pytest.raises(FileNotFoundError, match="no pairs"):
            pairs_of(tmp_path / name)


def test_several_sources_with_weights(tmp_path):
    write_shard(tmp_path / "a/0.tar", members(range(6), "a"))
    for i in range(2):
        write_shard(tmp_path / f"b/{i}.tar", members(range(4 * i, 4 * i + 4), "b"))
    pairs = pairs_of("a:2", "b:3", root=tmp_path)
    assert pairs.sizes.tolist() == [6, 6, 4, 4, 4, 4, 4, 4] and len(pairs) == 36
    assert Counter(pairs[i][1][0] for i in range(36)) == {
        f"a {i}": 2 for i in range(6)} | {f"b {i}": 3 for i in range(8)}
    write_shard(tmp_path / "d:2/0.tar", members(range(3), "d"))
    assert len(pairs_of("d:2", root=tmp_path)) == 3
    for weight in ("0", "-1", "0.5"):
        with pytest.raises(ValueError, match="whole number"):
            pairs_of(f"a:{weight}", root=tmp_path)


def test_names_of_shards_are_one_source_and_the_fingerprint_is_of_what_is_read(tmp_path):
    """As a shell expands set/{0..2}.tar."""
    for i in range(4):
        write_shard(tmp_path / f"{i}.tar", members(range(3 * i, 3 * i + 3)))
    some = pairs_of(*(tmp_path / f"{i}.tar" for i in range(3)))
    assert len(some.sources) == 1 and numbers_of(some) == list(range(9))
    prints = {pairs_of(*names, root=tmp_path).fingerprint for names in (
        ["0.tar", "1.tar"], ["1.tar", "0.tar"], ["0.tar", "1.tar:2"], [tmp_path], ["0.tar"])}
    assert len(prints) == 5 and all("pairs, " in text for text in prints)
    before = pairs_of("1.tar", root=tmp_path).fingerprint
    write_shard(tmp_path / "2.tar", members(range(9)))  # is not read
    os.utime(tmp_path / "1.tar", (1, 1))  # copied
    assert pairs_of(tmp_path / "1.tar").fingerprint == before


def test_captions_for_a_vocabulary_are_spread_over_the_pairs(tmp_path):
    write_shard(tmp_path / "0.tar", [*members(range(9)), ("9.jpg", b""), ("9.txt", b"")])
    pairs = pairs_of(tmp_path)
    assert list(pairs.captions(99)) == [f"text {i}" for i in range(9)]
    assert list(pairs.captions(4)) == ["text 0", "text 2", "text 5", "text 7"]


# ---- order
@pytest.mark.parametrize("sizes,window", [
    ([50], 10), ([7, 0, 13, 1, 9, 20], 15), ([100, 3, 3, 100], 20)])
def test_an_epoch_holds_each_pair_once_and_mixes_within_its_window(sizes, window):
    order = data.EpochOrder(sizes, 3, window)
    n = sum(sizes)
    epochs = [order(epoch, 0, n).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(n))
    assert data.EpochOrder(sizes, 4, window)(0, 0, n).tolist() != epochs[0]
    for start, stop in ((3, 17), (n - 2, n)):
        assert data.EpochOrder(sizes, 3, window)(1, start, stop).tolist() == epochs[1][start:stop]
    shard = np.repeat(np.arange(len(sizes)), sizes)[epochs[0]]
    group = window + 2 * max(sizes)  # no shard is spread over more positions than its group has
    assert all(np.ptp(np.flatnonzero(shard == number)) < group for number in set(shard.tolist()))


def test_what_a_seed_gives_stays_what_it_was():
    """Golden values: a run that is resumed after a change of the code reads the same pairs."""
    order = data.EpochOrder([3, 5, 2, 4], seed=7, window=5)
    assert order(1, 0, 14).tolist() == [3, 5, 8, 9, 4, 6, 7, 11, 10, 12, 13, 0, 1, 2]
    box = data.crop_box(300, 200, (0.5, 1.0), np.random.default_rng([7, 1, 2]))
    assert box == (73, 4, 199, 191)
    masks = [data.block_mask((14, 14), 0.75, np.random.default_rng([7, 1, 2])),
             data.random_mask(196, 0.75, np.random.default_rng([7, 1, 2]))]
    codes = [zlib.crc32(np.packbits(mask).tobytes()) for mask in masks]
    assert codes == [573807536, 1535699356]


def test_global_batches_are_the_same_for_any_number_of_ranks_and_from_any_step():
    def batches(first=0, last=12, world_size=1):
        order = data.EpochOrder([20, 9, 21], 5, 16)
        ranks = [list(data.GlobalBatchSampler(order, 12, first, last, rank, world_size))
                 for rank in range(world_size)]
        return [sum(parts, []) for parts in zip(*ranks)]
    expected = batches()
    assert expected == batches(world_size=2) == batches(world_size=4)
    assert batches(6) == expected[6:] == batches(6, world_size=3)
    stream = sum(expected, [])
    assert len(stream) == 144 and all(len(batch) == 12 for batch in expected)
    for epoch in range(2):  # one after the other, each pair once
        part = stream[50 * epoch:50 * epoch + 50]
        assert sorted(part) == [(epoch, i) for i in range(50)]


# ---- pictures: right, or an error
def test_decode_puts_transparency_on_white():
    palette = red_and_blue().quantize(4)
    decoded = data.decode(encoded(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((60, 0))[2] > 200


@pytest.mark.parametrize("orientation,red", [
    (1, (5, 16)), (3, (59, 16)), (6, (16, 5)), (8, (16, 59)), (2, (59, 16))])
def test_decode_turns_upright(orientation, red):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(red_and_blue(), exif=exif)
    image = data.decode(content)
    assert image.size == data.upright_size(data.open_picture(content))
    assert image.size == ((64, 32) if orientation < 5 else (32, 64))
    assert image.getpixel(red)[0] > 200 and image.getpixel(red)[2] < 60


def test_decode_reads_animated_cmyk_and_16_bit_pictures():
    red = Image.new("RGB", (16, 16), "red")
    for content in (encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
                    encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)):
        pixel = data.decode(content).getpixel((8, 8))
        assert np.abs(np.subtract(pixel, (255, 0, 0))).max() < 8
    ramp = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(4, 0)
    image = data.decode(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(np.array(image)[0, :, 1], np.arange(256))
    clear = encoded(Image.fromarray(ramp), "PNG", transparency=257 * 9)
    assert np.array(data.decode(clear))[0, 8:11, 0].tolist() == [8, 255, 10]


def bomb(side):
    """The beginning of a PNG file of side x side pixels."""
    chunk = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + zlib.crc32(chunk).to_bytes(4, "big")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BROKEN = dict(truncated=plain((200, 200))[:700], text=b"this is no picture",
              bomb=bomb(20_000), warned=bomb(10_000), program=EPS,
              long=encoded(Image.new("L", (1, 300_000)), "PNG"))


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_raise_what_training_catches(kind):
    with pytest.raises(data.BAD_IMAGE):
        data.decode(BROKEN[kind])


def test_damaged_exif_spares_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(red_and_blue(), "WEBP", exif=exif)  # of a JPEG, Pillow forgives it
    image = data.open_picture(content.replace(b"MM\x00*", b"????"))
    assert data.upright_size(image) == data.decode(image).size == (64, 32)


def test_reduced_decoding_shows_the_same_picture():
    """A crop of a large JPEG decoded at reduced scale against the crop of all its pixels."""
    y, x = np.mgrid[:900, :1200] / 60
    pixels = 128 + 60 * np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x * y / 20)], -1)
    content = encoded(Image.fromarray(pixels.astype(np.uint8)), quality=95)
    full = data.decode(content)
    for seed in range(12):
        box = data.crop_box(1200, 900, (0.1, 1.0), np.random.default_rng(seed))
        shrink = min(box[2:]) / 96
        small = data.decode(content, shrink)
        factor = 1200 / small.width
        assert factor <= shrink and (factor > 1 or shrink < 2)
        ours, theirs = (np.array(data.crop(image, box, 96, (1200, 900))).astype(float)
                        for image in (small, full))
        assert np.abs(ours - theirs).mean() < 1.5


# ---- transforms
def test_random_crops_keep_to_area_and_aspect():
    """On a picture of coordinates the crop can be read off the result."""
    y, x = np.mgrid[:200, :250].astype(np.uint8)
    image = Image.fromarray(np.stack([x, y, x], -1))
    for seed in range(100):
        box = data.crop_box(250, 200, (0.3, 1.0), np.random.default_rng(seed))
        out = np.array(data.crop(image, box, 32)).astype(float)
        w = (out[:, -1, 0] - out[:, 0, 0]).mean() * 32 / 31
        h = (out[-1, :, 1] - out[0, :, 1]).mean() * 32 / 31
        assert 0.72 < w / h < 1.39 and 0.28 < w * h / (200 * 250) <= 1.02
    assert data.crop_box(1000, 3, (0.9, 1.0), np.random.default_rng(0)) == (498, 0, 4, 3)


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
    theirs = transforms.Compose([
        transforms.Resize(48, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(48)])
    image = noise(*size)
    assert np.array_equal(np.array(theirs(image)), np.array(data.center_crop(image, 48)))


# ---- masks
@pytest.mark.parametrize("grid", [(14, 14), (7, 9)])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 1.0])
def test_masks_hide_exactly_the_share(grid, ratio):
    n = grid[0] * grid[1]
    for seed in range(10):
        for mask in (data.block_mask(grid, ratio, np.random.default_rng(seed)),
                     data.random_mask(n, ratio, np.random.default_rng(seed))):
            assert mask.dtype == bool and mask.shape == (n,) and mask.sum() == round(ratio * n)
    with pytest.raises(ValueError, match="share"):
        data.block_mask(grid, ratio + 1.1, np.random.default_rng(0))


def test_blocks_are_blocky_and_reach_everywhere():
    masks = np.stack([data.block_mask((14, 14), 0.5, np.random.default_rng(i)).reshape(14, 14)
                      for i in range(300)])
    assert np.mean(masks[:, 1:] == masks[:, :-1]) > 0.75  # 0.5 if patches were independent
    often = masks.mean(0)  # BEiT's blocks lie inside the grid and so prefer its middle
    assert 0.03 < often.min() and often.max() < 0.92


def test_masked_words_are_a_random_share_of_those_between_the_ends():
    """Never an end or padding.  "!" is id 0 in CLIP's vocabulary, as padding is."""
    tokens = torch.tensor([[8, 0, 5, 0, 1, 2, 0, 9], [8, 0, 9, 0, 0, 0, 0, 0],
                           [8, 9, 0, 0, 0, 0, 0, 0], [8, 1, 9, 2, 9, 0, 0, 0]])

    class Given:
        eot, mask = 9, 10

        def __call__(self, captions, length):
            return tokens

    samples = samples_of([], ("text", "mlm"), Given(), mlm_ratio=0.5)
    often = torch.zeros(8)
    for seed in range(100):
        rngs = [np.random.default_rng([seed, i]) for i in range(4)]
        batch = samples.collate([dict(caption="", rng=rng, bad=[]) for rng in rngs])
        chosen = batch["mlm_tokens"] == 10
        assert chosen.sum(1).tolist() == [3, 1, 0, 1] and chosen[1, 1] and chosen[3, 1]
        often += chosen[0]
    assert not often[0] and not often[7] and 25 < often[1:7].min() and often[1:7].max() < 75


# ---- samples and batches
@pytest.mark.parametrize("kind", ["truncated", "warned", "caption"])
def test_a_bad_pair_is_replaced_by_the_same_one_each_time_and_named(tmp_path, kind):
    bad = [("bad.jpg", BROKEN.get(kind, plain())),
           ("bad.txt", b" \n" if kind == "caption" else b"bad")]
    write_shard(tmp_path / "0.tar", [*bad, *members(range(9), "good")])
    samples = samples_of(pairs_of(tmp_path))
    first, again, good, other = (samples[key] for key in [(0, 0), (0, 0), (0, 1), (1, 1)])
    assert len(first["bad"]) == 1 and "0.tar at byte" in first["bad"][0] and good["bad"] == []
    assert "good" in first["caption"]
    assert not np.array_equal(good["views"][0], good["views"][1])
    assert not np.array_equal(good["views"], other["views"])
    assert all(np.array_equal(first[name], again[name]) for name in ("images", "views", "caption"))


def test_nothing_but_bad_pairs_is_an_error(tmp_path):
    write_shard(tmp_path / "0.tar", [("0.jpg", b"x"), ("0.txt", b"x")])
    with pytest.raises(ValueError, match="damaged"):
        samples_of(pairs_of(tmp_path))[0, 0]


def test_a_shard_that_shrinks_during_a_run_gives_bad_pairs(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", members(range(10 * number, 10 * number + 10)))
    samples = samples_of(pairs_of(tmp_path), ("images", "text"))
    os.truncate(tmp_path / "1.tar", 4000)
    read = [samples[0, i] for i in range(20)]
    assert all("changed" in sample["bad"][0] for sample in read[10:])


def test_one_of_several_captions_is_drawn_at_each_visit(tmp_path):
    fields = json.dumps(dict(title="red", description="blue", caption="")).encode()
    write_shard(tmp_path / "0.tar", [("a.jpg", plain()), ("a.json", fields)])
    samples = samples_of(pairs_of(tmp_path), ("images", "text"))
    drawn = [samples[epoch, 0]["caption"] for epoch in range(60)]
    assert 15 < Counter(drawn)["red"] < 45 and set(drawn) == {"red", "blue"}
    assert drawn[:9] == [samples[epoch, 0]["caption"] for epoch in range(9)]


def test_a_batch_holds_what_the_methods_need(tmp_path):
    captions = [b"red star", b"a", b"b\xc3\xa9 au", b"red star " * 5000]
    write_shard(tmp_path / "0.tar", [*((f"{i}.txt", text) for i, text in enumerate(captions)),
                                     *((f"{i}.jpg", plain()) for i in range(4))])
    samples = samples_of(pairs_of(tmp_path))
    batch = samples.collate([samples[0, i] for i in range(4)])
    assert batch["bad"] == []
    assert batch["images"].shape == (4, 32, 32, 3) and batch["images"].dtype == torch.uint8
    assert batch["views"].shape == (4, 2, 32, 32, 3)
    tok, tokens = samples.tokenizer, batch["tokens"]
    assert tokens.shape == (4, 12) and tokens[:, 0].tolist() == [tok.sot] * 4
    assert tokens[3, 11] == tok.eot  # a text that is cut to the context length ends too
    assert batch["ids_hide"].shape == (4, 12) and batch["ids_keep"].shape == (4, 4)
    for hide, keep in zip(batch["ids_hide"].tolist(), batch["ids_keep"].tolist()):
        assert sorted(hide + keep) == list(range(16))
    masked = batch["mlm_tokens"] != tokens
    assert (batch["mlm_tokens"][masked] == tok.mask).all()
    assert torch.equal(masked.flatten().nonzero()[:, 0], batch["mlm_ids"])
    assert torch.equal(tokens.flatten()[batch["mlm_ids"]], batch["mlm_targets"])


# ---- the loader
def loader_of(samples, sizes, first=0, last=6, rank=0, world_size=1, workers=0):
    ranks = SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
    return data.make_loader(samples, sizes, 1, 8, first, last, ranks, workers, samples.collate)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_the_same_for_any_workers_ranks_and_restarts(tmp_path):
    write_shard(tmp_path / "0.tar", members(range(21)))  # one shard, many workers
    pairs = pairs_of(tmp_path)
    samples = samples_of(pairs)

    def batches(world_size=1, **options):
        ranks = [loader_of(samples, pairs.sizes, rank=rank, world_size=world_size, **options)
                 for rank in range(world_size)]
        joined = []
        for parts in zip(*ranks):  # of each rank its part of a batch
            arrays = [torch.cat([part[name] for part in parts]).numpy().tobytes()
                      for name in ("images", "views", "ids_hide")]
            texts = [row for part in parts for row in part["tokens"].tolist()]
            joined.append((arrays, [[token for token in row if token] for row in texts]))
        return joined
    expected = batches()
    assert len(expected) == 6 and expected[0] != expected[1]
    for options in (dict(workers=3), dict(world_size=2), dict(world_size=4)):
        assert batches(**options) == expected, options
    assert batches(first=4, world_size=2, workers=1) == expected[4:]


def test_loader_processes_leave_signals_to_the_main_process():
    class Signalled(torch.utils.data.Dataset):
        def __getitem__(self, key):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            return key
        collate = list
    assert len(list(loader_of(Signalled(), [16], last=2, workers=1))) == 2
