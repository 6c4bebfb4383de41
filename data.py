"""Everything between files and a batch: the drawn demo world, pairs from tar shards, transforms, masks, batches.

Order, crops and masks are pure functions of (seed, epoch, sample), so any number of workers and ranks sees the same.
A worker hands over uint8 pixels; `normalize` runs on the device.  Sources: SLIP (views), SimCLR (distortions),
BEiT (block masks), webdataset and img2dataset (layout of the shards: KEY.jpg, KEY.txt, KEY.json).

    draw_demo("data/demo");  pairs = Shards("data/demo/train");  image, caption = pairs[0]
"""
import io
import json
import math
import os
import shutil
import signal
import struct
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # signals that end a run in good order
# What Pillow's decoders are known to raise on damaged or hostile files.
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


# ---------------------------------------------------------------- the demo world: scenes and sentences from a seed

DEMO_VERSION = 1  # part of the stamp: a change of the pictures below changes it, and old caches are drawn anew
COLOURS = dict(red=(214, 40, 40), yellow=(250, 215, 50), green=(40, 155, 70), blue=(40, 90, 215),
               black=(25, 25, 28), white=(250, 250, 250))
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
SIZES = dict(small=(8.0, 10.0), large=(13.5, 16.5))  # radius in pixels of a 64-pixel picture
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
HELD_OUT = ("red star", "blue ring", "green triangle", "white square")  # never in a training picture
# Each shape has a texture of its own, in two tones of its colour, as real things have: a small ViT learns textures in
# minutes, plain outlines in hours (we measured both).  (u, v) in pixels from the middle -> where the other tone is.
PATTERNS = dict(square=lambda u, v: (u // 4 + v // 4) % 2 == 1, triangle=lambda u, v: v % 5 < 2.5,
                star=lambda u, v: u % 5 < 2.5, cross=lambda u, v: (u % 5 - 2.5) ** 2 + (v % 5 - 2.5) ** 2 < 2.5,
                ring=lambda u, v: np.arctan2(v, u) * 4 / np.pi % 2 < 1, diamond=lambda u, v: v > 0)
GROUNDS = ("plain", "shaded", "striped", "spotted", "grainy")


def _outline(shape):
    """The corners (n, 2) of a shape inside the unit circle, y down."""
    if shape in ("circle", "ring"):
        n, radius = 40, np.ones(40)
    elif shape == "star":
        n, radius = 10, np.tile([1.0, 0.42], 5)
    elif shape == "cross":
        a, b = 0.95, 0.32
        return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                         (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
    else:
        n = dict(square=4, diamond=4, triangle=3)[shape]
        radius = np.full(n, 1.1)
    angle = 2 * np.pi * np.arange(n) / n - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


def _ground(kind, size, rng):
    """A background picture in two muted tones, so that no colour word is true of it."""
    base = rng.uniform(110, 195) + rng.uniform(-14, 14, 3)
    other = base + rng.choice([-1, 1]) * rng.uniform(14, 30)
    y, x = np.mgrid[:size, :size] / size
    angle, step = rng.uniform(0, np.pi), rng.uniform(5, 9)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == "plain":
        blend = np.zeros_like(x)
    elif kind == "shaded":
        blend = (along - along.min()) / np.ptp(along)
    elif kind == "striped":
        blend = (along * step) % 1 < 0.5
    elif kind == "spotted":
        blend = ((x * step) % 1 - 0.5) ** 2 + ((y * step) % 1 - 0.5) ** 2 < 0.08
    else:
        blend = rng.random((size, size))
    pixels = base + (other - base) * np.asarray(blend, float)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _place(rng, count, classes):
    """`count` objects that do not touch, in a 64-pixel square.  -> list of dicts"""
    objects = []
    while len(objects) < count:
        objects = []
        for name in rng.choice(classes, count, replace=False).tolist():
            size = str(rng.choice(list(SIZES)))
            radius = rng.uniform(*SIZES[size])
            for _ in range(20):  # until the place is free; else the whole scene is tried again
                x, y = rng.uniform(radius + 1, 63 - radius, 2)
                if all(math.hypot(x - o["x"], y - o["y"]) > radius + o["radius"] + 2 for o in objects):
                    objects.append(dict(name=name, size=size, x=x, y=y, radius=radius, turn=rng.uniform(-0.25, 0.25)))
                    break
    return objects


def _draw_shape(canvas, o, k, fill):
    """Fill an object's outline on a canvas whose side is k * 64."""
    pen = ImageDraw.Draw(canvas)
    shape, centre, radius = o["name"].split()[1], k * np.array([o["x"], o["y"]]), k * o["radius"]
    pen.polygon([tuple(centre + radius * corner) for corner in _outline(shape) @ _rotation(o["turn"])], fill=fill)
    if shape == "ring":
        pen.circle(tuple(centre), radius * 0.55, fill=0)


def _rotation(turn):
    return np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])


def draw_scene(rng, count, classes):
    """Draw `count` objects of the given classes on a ground.

    -> picture (RGB, 64 x 64), labels (L, 0 = ground, else 1 + number in CLASSES), objects (dicts), ground's name
    """
    objects, ground = _place(rng, count, classes), str(rng.choice(GROUNDS))
    k = 2  # drawn at twice the size, then halved: smooth edges
    picture, labels = _ground(ground, 64 * k, rng), Image.new("L", (64, 64))
    for o in objects:
        colour, shape = o["name"].split()
        tone = (np.array(COLOURS[colour]) + rng.uniform(-18, 18, 3)).clip(0, 255)
        other = tone * 0.4 + (150 if tone.sum() < 330 else 0)  # dark colours get a lighter tone, light ones a darker
        x0, y0, x1, y1 = (int(k * (c + d * 1.2 * o["radius"])) for d in (-1, 1) for c in (o["x"], o["y"]))
        y, x = np.mgrid[y0:y1, x0:x1] / k
        u, v = np.tensordot(_rotation(o["turn"]), [x - o["x"], y - o["y"]], 1)
        pattern = PATTERNS[shape](u, v) if shape in PATTERNS else np.zeros_like(u, bool)
        stencil = Image.new("L", picture.size)
        _draw_shape(stencil, o, k, 255)
        picture.paste(Image.fromarray(np.where(pattern[..., None], other, tone).astype(np.uint8)), (x0, y0),
                      stencil.crop((x0, y0, x1, y1)))
        _draw_shape(labels, o, 1, 1 + CLASSES.index(o["name"]))
    return picture.resize((64, 64), Image.BOX), labels, objects, ground


def describe(objects, ground, rng, full=False):
    """A true sentence about a scene.

    What it leaves out (colours, sizes, the ground, a relation) is drawn too: where no colour is said, the shape has
    to be learned.  full: size, colour and shape of every object are said, as a test of retrieval needs.
    """
    def noun(o):
        colour, shape = o["name"].split()
        return " ".join(["a", *[o["size"]] * (full or rng.random() < 0.5), *[colour] * (full or rng.random() < 0.6),
                         shape])

    first, *rest = (objects[i] for i in rng.permutation(len(objects)))
    words = noun(first)
    if not rest:
        side = ["left", "middle", "right"][min(2, int(first["x"] // 21.4))]
        end = [f" on the {side}", " in the picture", ""][rng.integers(3)]
        text = [f"{words}{end}", f"a picture of {words}", f"there is {words}{end}", f"one {words[2:]}"][rng.integers(4)]
    else:
        dx, dy = rest[0]["x"] - first["x"], rest[0]["y"] - first["y"]
        across, up = "right of" if dx < 0 else "left of", "below" if dy < 0 else "above"
        others = [noun(o) for o in rest]
        if rng.random() < 0.6:
            text = ", and ".join([f"{words} {across if abs(dx) > abs(dy) else up} {others[0]}", *others[1:]])
        else:
            text = " and ".join([", ".join([words, *others[:-1]]), others[-1]])
        text = ["", "a picture of ", "there is "][rng.integers(3)] + text
    if rng.random() < 0.15:
        text += f" on a {ground} ground"
    return text


def _draw_shard(folder, seed, number, size):
    """One training shard of the demo: `size` scenes of one to three objects."""
    classes = [name for name in CLASSES if name not in HELD_OUT]
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(size):
            rng = np.random.default_rng([seed, 0, number, i])
            picture, _, objects, ground = draw_scene(rng, int(rng.choice([1, 1, 2, 2, 3])), classes)
            for suffix, content in (("png", _png(picture)), ("txt", describe(objects, ground, rng).encode())):
                member = tarfile.TarInfo(f"{number:05d}{i:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def draw_demo(folder, shards=20, shard_size=1000, seed=0):
    """Draw the demo world once; a second call returns at once.  -> folder

    train/00000.tar ...                    pairs without the HELD_OUT combinations
    val/karpathy.json, val/images/         retrieval: 500 scenes of two or three objects, two sentences each
    classes/{train,test}/CLASS/            single objects: 42 classes, 20 and 12 pictures each
    dense/{images,labels}/, classes.txt    200 scenes with label pictures, 0 = ground, k = line k of classes.txt
    """
    folder = Path(folder)
    stamp = dict(demo=DEMO_VERSION, shards=shards, shard_size=shard_size, seed=seed)
    stamp_file = folder / "demo.json"

    def drawn():
        return stamp_file.is_file() and json.loads(stamp_file.read_text("utf-8")) == stamp
    if drawn():
        return folder
    if folder.exists() and not stamp_file.is_file():
        raise FileExistsError(f"{folder} exists and was not drawn by this program: move it away, or use another --root")
    part = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        (part / "train").mkdir(parents=True)
        with ProcessPoolExecutor(min(shards, os.cpu_count() or 1), initializer=ignore_stops) as pool:
            draw = partial(_draw_shard, part / "train", seed, size=shard_size)
            list(tqdm(pool.map(draw, range(shards)), "drawing the demo world", shards, disable=None, leave=False))
        _draw_tests(part, seed)
        (part / "demo.json").write_text(json.dumps(stamp), "utf-8")
        if not drawn():  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _draw_tests(folder, seed):
    # The second number of a seed is the set's: 0 is training, so no test picture is a training picture.
    (folder / "val/images").mkdir(parents=True)
    images = []
    for i in range(500):
        rng = np.random.default_rng([seed, 1, i])
        picture, _, objects, ground = draw_scene(rng, int(rng.integers(2, 4)), CLASSES)
        picture.save(folder / f"val/images/{i:05d}.png")
        sentences = [dict(raw=describe(objects, ground, rng, full=True), imgid=i, sentid=2 * i + k) for k in range(2)]
        images.append(dict(filename=f"{i:05d}.png", imgid=i, split="test", sentences=sentences,
                           sentids=[s["sentid"] for s in sentences]))
    templates = "a {}\na picture of a {}\nthere is a {}\nthere is a {} in the picture\n"
    (folder / "val/karpathy.json").write_text(json.dumps(dict(images=images, dataset="demo")), "utf-8")
    for part, (split, each) in enumerate(dict(train=20, test=12).items()):
        for number, name in enumerate(CLASSES):
            (folder / "classes" / split / name).mkdir(parents=True)
            for i in range(each):
                picture = draw_scene(np.random.default_rng([seed, 2, part, number, i]), 1, [name])[0]
                picture.save(folder / "classes" / split / name / f"{i:03d}.png")
        (folder / "classes" / split / "templates.txt").write_text(templates, "utf-8")
    for kind in ("images", "labels"):
        (folder / "dense" / kind).mkdir(parents=True)
    (folder / "dense/classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
    (folder / "dense/templates.txt").write_text(templates, "utf-8")
    for i in range(200):
        rng = np.random.default_rng([seed, 3, i])
        picture, labels, _, _ = draw_scene(rng, int(rng.integers(2, 4)), CLASSES)
        picture.save(folder / f"dense/images/{i:05d}.png")
        labels.save(folder / f"dense/labels/{i:05d}.png")


# ---------------------------------------------------------------- pairs from shards

def find(name, root):
    """The folder of shards of a data set: ROOT/NAME or the path NAME, or train/ in it.  The demo is drawn first.

    Raises FileNotFoundError that says what was looked for.
    """
    if name == "demo":
        return draw_demo(Path(root) / "demo") / "train"
    tried = [folder / part for folder in (Path(root) / name, Path(name)) for part in ("", "train")]
    for folder in tried:
        if any(folder.glob("*.tar")):
            return folder
    raise FileNotFoundError(f"no data set '{name}': looked for *.tar in {', '.join(map(str, tried))}; "
                            "wanted there are shards of KEY.jpg and KEY.txt as img2dataset writes them "
                            "(--root or $MASKCLIP_DATA name another place)")


class Shards:
    """Image-caption pairs of folders of tar shards: KEY.jpg|jpeg|png|webp beside KEY.txt, or KEY.json's "caption".

    Headers are read once; a pair is then two seeks.  A shard that is cut off gives the pairs before the cut, and its
    name goes to `damage` (list of sentences).  Raises FileNotFoundError where there are no pairs at all.
    """

    def __init__(self, *folders):
        self.paths = [path for folder in folders for path in sorted(Path(folder).glob("*.tar"))]
        self.damage, rows, lonely = [], [], 0
        for number, path in enumerate(tqdm(self.paths, "reading shard headers", disable=None, leave=False)):
            images, captions = {}, {}
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        key, _, suffix = member.name.rpartition(".")
                        suffix, place = suffix.lower(), (member.offset_data, member.size)
                        if "." + suffix in IMAGE_SUFFIXES:
                            images[key] = place
                        elif suffix == "txt" or suffix == "json" and key not in captions:
                            captions[key] = (*place, suffix == "json")
                with open(path, "rb") as file:  # tarfile ends in silence at a header that is cut off or spoilt
                    file.seek(tar.offset)
                    if file.read(512) != bytes(512):
                        raise tarfile.ReadError(f"no further header at byte {tar.offset}, nor an end of the archive")
            except (tarfile.ReadError, EOFError) as error:
                self.damage.append(f"{path} is damaged ({error}): the pairs before the damage are used")
            rows += [(number, *place, *captions[key]) for key, place in images.items() if key in captions]
            lonely += len(images.keys() ^ captions.keys())
        if not rows:
            raise FileNotFoundError(f"no pairs in {', '.join(map(str, folders))}: {len(self.paths)} shards hold no "
                                    f"picture (KEY{'|'.join(IMAGE_SUFFIXES)}) with a caption (KEY.txt or KEY.json)"
                                    + "".join(f"; {line}" for line in self.damage[:3]))
        if lonely:
            self.damage.append(f"{lonely} pictures or captions have no partner and are left out")
        self.rows = np.array(rows)  # (n, 6): shard, picture's offset and size, caption's offset and size, is it json

    def __len__(self):
        return len(self.rows)

    def name(self, index):
        """Where pair `index` lies, for messages."""
        return f"{self.paths[self.rows[index, 0]]} at byte {self.rows[index, 1]}"

    def caption(self, index):
        """The caption of pair `index`; ValueError where it is empty."""
        shard, _, _, offset, size, is_json = self.rows[index].tolist()
        raw = self._read(shard, offset, size).decode("utf-8", "replace")
        if is_json:
            fields = json.loads(raw)
            raw = fields.get("caption") if isinstance(fields, dict) else None
        if not isinstance(raw, str) or not raw.strip():
            raise ValueError("empty caption")
        return raw.strip()

    def captions(self, limit):
        """The captions of the first `limit` pairs that have one, to learn a vocabulary from."""
        for index in range(min(limit, len(self))):
            try:
                yield self.caption(index)
            except ValueError:
                pass  # an empty or unreadable caption: counted when the pair is drawn

    def __getitem__(self, index):
        """-> (RGB picture, caption).  Raises one of BAD_IMAGE where the pair cannot be used."""
        shard, offset, size = self.rows[index, :3].tolist()
        return decode(self._read(shard, offset, size)), self.caption(index)

    def _read(self, shard, offset, size):
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            return file.read(size)


def decode(content):
    """Bytes of a picture file -> RGB picture: upright (EXIF), transparency on white.  Raises one of BAD_IMAGE."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


# ---------------------------------------------------------------- transforms: PIL in, PIL out

def random_resized_crop(image, size, scale, rng, ratio=(3 / 4, 4 / 3)):
    """Inception's crop as torchvision draws it: a share of the area in `scale`, an aspect in `ratio`, then bilinear."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return image.resize((size, size), Image.BILINEAR, (x, y, x + w, y + h))
    # An extreme picture: the largest middle part of an allowed aspect.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return image.resize((size, size), Image.BILINEAR, (x, y, x + w, y + h))


def simclr_view(image, size, rng):
    """SLIP's view for SimCLR: crop (.08, 1), jitter (.4, .4, .4, .1) p .8, grey .2, blur (.1, 2) p .5, mirror .5."""
    image = random_resized_crop(image, size, (0.08, 1.0), rng)
    if rng.random() < 0.8:
        for change in rng.permutation(4):
            if change == 3:  # hue: a turn of at most a tenth of the circle
                hue, saturation, value = image.convert("HSV").split()
                hue = Image.fromarray(np.asarray(hue) + np.uint8(rng.integers(-25, 26) % 256))  # wraps around
                image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
            else:
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
                image = enhance(image).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def center_crop(image, size, resample=Image.BICUBIC):
    """The evaluation view (CLIP): the shorter side resized to `size`, then the middle square, as torchvision rounds."""
    short = min(image.size)
    image = image.resize([size * side // short for side in image.size], resample)
    x, y = (round((side - size) / 2) for side in image.size)
    return image.crop((x, y, x + size, y + size))


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """uint8 pixels (..., H, W, 3) on any device -> float32 (..., 3, H, W)."""
    mean, std = (torch.tensor(x, device=images.device) * 255 for x in (mean, std))
    return ((images - mean) / std).movedim(-1, -3).contiguous()


# ---------------------------------------------------------------- masks: True = hidden from the student

def _check_ratio(ratio):
    if not 0 <= ratio <= 1:
        raise ValueError(f"the share of hidden patches must be from 0 to 1, not {ratio}")


def random_mask(n_patches, ratio, rng):
    """Hide exactly round(ratio * n_patches) patches drawn at random (the paper, MAE).  -> bool (n_patches,)"""
    _check_ratio(ratio)
    mask = np.zeros(n_patches, bool)
    mask[rng.permutation(n_patches)[:round(ratio * n_patches)]] = True
    return mask


def block_mask(grid, ratio, rng):
    """Hide exactly round(ratio * n) patches in blocks (BEiT's proposal).  grid (rows, columns) -> bool (n,)

    Blocks of random area and aspect are laid on the grid until enough is hidden; what the last one hid too much is
    shown again, from its bottom right corner.
    """
    _check_ratio(ratio)
    rows, columns = grid
    hidden, mask = round(ratio * rows * columns), np.zeros(grid, bool)
    smallest = rows * columns * 16 / 196  # BEiT: 16 of 196 patches
    while (missing := hidden - mask.sum()) > 0:
        area = rng.uniform(smallest, max(smallest, missing))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))  # BEiT
        h = min(rows, max(1, round(math.sqrt(area * aspect))))
        w = min(columns, max(1, round(math.sqrt(area / aspect))))
        y, x = rng.integers(rows - h + 1), rng.integers(columns - w + 1)
        block = np.zeros(grid, bool)
        block[y:y + h, x:x + w] = True
        new = np.flatnonzero(block & ~mask)
        mask.flat[new[:missing]] = True
    return mask.ravel()


# ---------------------------------------------------------------- batches

class Samples(torch.utils.data.Dataset):
    """(epoch, index) -> one training sample; all that is random in it is drawn from (seed, epoch, index).

    `needs` names what the method's forward reads (model.METHODS[...].needs): any of images, views, text, mask, mlm;
    `config` is train.TrainConfig, `shape` is model.ModelConfig (image_size, grid, context_length).
    A pair that cannot be used is replaced by another, the same one each time, and named in "bad".
    """

    def __init__(self, pairs, tokenizer, needs, config, shape):
        self.pairs, self.tokenizer, self.needs, self.config, self.shape = pairs, tokenizer, needs, config, shape

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        epoch, index = key
        config, rng, bad = self.config, np.random.default_rng([self.config.seed, *key]), []
        while True:
            try:
                image, caption = self.pairs[index]
                break
            except BAD_IMAGE as error:
                bad.append(f"{self.pairs.name(index)}: {error}")
                if len(bad) == 20:
                    raise ValueError("20 bad pairs in a row, the data is damaged: " + "; ".join(bad[:3])) from error
                index = int(rng.integers(len(self.pairs)))
        sample, size, side = dict(bad=bad), self.shape.image_size, self.shape.grid
        if "images" in self.needs:
            sample["images"] = _pixels(random_resized_crop(image, size, (config.crop_min, 1.0), rng))
        if "views" in self.needs:
            sample["views"] = torch.stack([_pixels(simclr_view(image, size, rng)) for _ in range(2)])
        if "mask" in self.needs:
            mask = torch.from_numpy(block_mask((side, side), config.mask_ratio, rng) if config.mask == "block" else
                                    random_mask(side * side, config.mask_ratio, rng))
            sample["ids_keep"], sample["ids_hide"] = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        if "text" in self.needs:
            sample["tokens"] = self.tokenizer(caption, self.shape.context_length)[0]
        if "mlm" in self.needs:
            sample["mlm"] = _mlm_mask(len(sample["tokens"]), config.mlm_ratio, rng)
        return sample

    def collate(self, samples):
        """A list of samples -> a batch of tensors, texts as long as the longest; "bad" is one list."""
        def padded(name):  # (B, L)
            return torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
        batch = dict(bad=[line for sample in samples for line in sample["bad"]])
        for name in ("images", "views", "ids_keep", "ids_hide"):
            if name in samples[0]:
                batch[name] = torch.stack([sample[name] for sample in samples])
        if "tokens" in samples[0]:
            batch["tokens"] = padded("tokens")
        if "mlm" in samples[0]:
            chosen = padded("mlm")
            batch["mlm_tokens"] = batch["tokens"].masked_fill(chosen, self.tokenizer.mask)
            batch["mlm_ids"] = chosen.flatten().nonzero()[:, 0]                  # (R,) places in the flattened (B, L)
            batch["mlm_targets"] = batch["tokens"].flatten()[batch["mlm_ids"]]   # (R,)
        return batch


def _pixels(image):
    return torch.from_numpy(np.array(image))  # (H, W, 3) uint8


def _mlm_mask(length, ratio, rng):
    """Which of a row's tokens to mask: a share `ratio` of those between start and end, at least one if there is any."""
    inner = length - 2
    mask = torch.zeros(length, dtype=torch.bool)
    mask[1 + rng.permutation(inner)[:max(1, round(ratio * inner))]] = True
    return mask


def ignore_stops(*_):
    """Ctrl-C and schedulers signal worker processes too: the main process answers."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class GlobalBatches(torch.utils.data.Sampler):
    """The (epoch, index) keys of this rank's share of each global batch, from global step `first` to the last.

    An epoch is a permutation drawn from (seed, epoch), cut into global batches; the rest of it is left out.  Rank r
    of W takes rows r * B/W .. (r+1) * B/W - 1 of each, so that the global batches do not depend on W.
    """

    def __init__(self, n, batch_size, seed, first, last, rank=0, world=1):
        self.n, self.batch_size, self.seed, self.first, self.last = n, batch_size, seed, first, last
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        per_epoch = self.n // self.batch_size
        for step in range(self.first, self.last):
            epoch, k = divmod(step, per_epoch)
            if k == 0 or step == self.first:
                order = np.random.default_rng([self.seed, epoch, self.n]).permutation(self.n)  # n: no sample's seed
            batch = order[k * self.batch_size:(k + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in batch[self.share]]


# ---------------------------------------------------------------- evaluation sets

def class_folder(folder):
    """A folder with one folder of pictures per class.  -> paths, labels (list of int), class names (sorted)"""
    folder = Path(folder)
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    found = [(path, label) for label, name in enumerate(names) for path in picture_files(folder / name)]
    if not found:
        raise FileNotFoundError(f"no class folders with pictures in {folder.resolve()}: a data set for zero-shot or "
                                "linear evaluation is a folder that holds one folder of pictures per class")
    empty = sorted(set(range(len(names))) - {label for _, label in found})
    if empty:
        raise ValueError(f"no pictures of {len(empty)} classes in {folder}: {', '.join(names[i] for i in empty[:5])}")
    return [path for path, _ in found], [label for _, label in found], names


def picture_files(folder):
    """The picture files of a folder, sorted by name."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def karpathy(folder):
    """The test pairs of a folder with a Karpathy json.  -> paths of pictures, sentences, picture of each sentence

    The json is karpathy.json or dataset.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, with
    "filepath" (COCO) a folder under images/.  Raises FileNotFoundError without one, ValueError for another format.
    """
    folder = Path(folder)
    file = next((f for f in (folder / "karpathy.json", folder / "dataset.json") if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no karpathy.json or dataset.json in {folder.resolve()}: a retrieval set is a folder "
                                "with that file (Karpathy's format) and its pictures in images/")
    paths, texts, owners = [], [], []
    try:
        for image in json.loads(file.read_text("utf-8"))["images"]:
            if image["split"] == "test":
                owners += [len(paths)] * len(image["sentences"])
                texts += [sentence["raw"] for sentence in image["sentences"]]
                paths.append(folder / "images" / image.get("filepath", "") / image["filename"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a Karpathy json ({type(error).__name__}: {error})") from error
    if not paths:
        raise ValueError(f"{file} has no picture of split 'test'")
    return paths, texts, owners
