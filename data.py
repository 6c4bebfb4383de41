"""Everything between files and a batch: the drawn demo world, pairs from shards and tables, order, transforms, masks.

Order, captions, crops and masks are pure functions of (seed, epoch, position): any number of workers and ranks, and any
restart, sees the same.  Ideas: SLIP (views, YFCC-15M), SimCLR (distortions), BEiT (block masks), webdataset and
img2dataset (layout of the shards).  A worker hands over uint8 pixels; `normalize` runs on the device.

    python data.py stats demo                          pairs, caption lengths, picture sizes
    python data.py show demo --out sheet.png           random pairs as training sees them
    python data.py check cc3m                          read everything once; training skips what is bad
    python data.py pack table.tsv --out DIR --size 256      any source -> shards
    python data.py yfcc SUBSET.tsv DATASET.txt --out yfcc15m.tsv     captions of YFCC-15M, cleaned as SLIP's
"""
import argparse
import bisect
import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import tarfile
import textwrap
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice, zip_longest
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from tokenizer import Tokenizer, write_atomically

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # signals that end a run in good order
# What Pillow's decoders are known to raise on damaged or hostile files; the warning is made an error in open_picture.
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
             Image.DecompressionBombWarning)


# ---------------------------------------------------------------- work on all cores

def ignore_stops(*_):
    """Ctrl-C and schedulers signal worker processes too: the main process answers."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def ignore_ctrl_c(*_):
    """For processes that the main process ends by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Jobs(torch.utils.data.Dataset):
    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.function(self.items[i])


def _same(result):
    return result


def in_parallel(function, items, label):
    """[function(item) for item in items], by as many processes as there are cores, with a progress bar."""
    workers = min(os.cpu_count() or 1, len(items)) if len(items) > 3 else 0
    loader = torch.utils.data.DataLoader(_Jobs(function, items), batch_size=None, collate_fn=_same, num_workers=workers,
                                         worker_init_fn=ignore_ctrl_c)
    return list(tqdm(loader, label, disable=None, leave=False))


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


def _draw_shard(folder, seed, size, number):
    """One training shard of the demo: `size` scenes of one to three objects."""
    classes = [name for name in CLASSES if name not in HELD_OUT]
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(size):
            rng = np.random.default_rng([seed, 0, number, i])
            picture, _, objects, ground = draw_scene(rng, int(rng.choice([1, 1, 2, 2, 3])), classes)
            for suffix, content in (("png", _encoded(picture, "PNG", compress_level=1)),
                                    ("txt", describe(objects, ground, rng).encode())):
                add_member(tar, f"{number:05d}{i:04d}.{suffix}", content)


def add_member(tar, name, content):
    """Write bytes as a file of a tar; all else in the header is constant, so equal pairs make equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _encoded(picture, kind, **how):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
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
        in_parallel(partial(_draw_shard, part / "train", seed, shard_size), range(shards), "drawing the demo world")
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


# ---------------------------------------------------------------- sources: where each picture and its captions lie

# One row a pair.  The picture is bytes of a file (a shard, a zip), or a file of its own that the record names; the
# text is a member of the shard or a record of the table.  29 bytes: 15 million pairs take 435 MB.
ROW = np.dtype([("file", "<u4"), ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"),
                ("kind", "u1")])
TXT, JSON, OWN_FILE, ZIP_STORED, ZIP_DEFLATED = range(5)  # kind: the first two in shards, the others in tables
IMAGE_FIELDS = ("image", "filepath", "file_name", "filename", "path")
TEXT_FIELDS = ("caption", "captions", "title", "description", "text")
TABLES = (".tsv", ".csv", ".jsonl", ".pkl", ".npy")
TEMPLATES = ("{}", "a {}", "a picture of a {}", "a photo of a {}")  # our choice, where a set has no templates.txt
INDEX_VERSION = 1
PART = 4096  # records of a table that the order moves together, as it does the pairs of a shard


def expand(pattern):
    """shards/{00000..00331}.tar, {cc3m,cc12m}: braces as the shell expands them.  -> list of str"""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    items = [f"{i:0{len(span[1])}d}" for i in range(int(span[1]), int(span[2]) + 1)] if span else match[1].split(",")
    return [text for item in items for text in expand(pattern[:match.start()] + item + pattern[match.end():])]


def locate(name, root):
    """The shards of a data set (list), or its table, or its folder of classes: ROOT/NAME or the path NAME, or train/.

    The demo is drawn first.  Raises FileNotFoundError that says what was looked for.
    """
    if name == "demo":
        draw_demo(Path(root) / "demo")
    places = [Path(root) / name, Path(name)]
    for place in places:
        if place.is_file():
            return [place] if place.suffix == ".tar" else place
    folders = [folder for place in places for folder in (place, place / "train") if folder.is_dir()]
    for folder in folders:
        if shards := [path for path in sorted(folder.glob("*.tar")) if not path.name.startswith(".")]:
            return shards
    for folder in folders:
        tables = [path for path in sorted(folder.iterdir()) if path.suffix in TABLES and path.is_file()]
        if len(tables) > 1:
            raise ValueError(f"{len(tables)} tables in {folder}: name the one that is wanted, say --data {tables[0]}")
        if tables:
            return tables[0]
    for folder in folders:
        if any(picture_files(entry) for entry in folder.iterdir() if entry.is_dir()):
            return folder
    looked = ", ".join(str(path) for place in places for path in (place, place / "train"))
    raise FileNotFoundError(f"no data set '{name}': looked for *.tar, a table ({', '.join(TABLES)}) or class folders "
                            f"in {looked}; shards hold KEY.jpg and KEY.txt as img2dataset writes them (--root or "
                            "$MASKCLIP_DATA name another place; README says how to get the data sets)")


def beside(path, suffix):
    """Where a file made from `path` may lie: beside it, or in the user's cache where that is read-only."""
    path = Path(os.path.abspath(path))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "maskclip"
    name = path.name + suffix
    return path.with_name(name), cache / f"{hashlib.sha1(os.fsencode(path)).hexdigest()[:16]}-{name}"


def made(path, suffix):
    """The newer of the two files of `beside`, or None."""
    found = [place for place in beside(path, suffix) if place.is_file()]
    return max(found, key=lambda place: place.stat().st_mtime_ns, default=None)


def to_make(path, suffix):
    """The first of the two files of `beside` that can be written."""
    near, far = beside(path, suffix)
    if os.access(near.parent, os.W_OK):
        return near
    far.parent.mkdir(parents=True, exist_ok=True)
    return far


@contextlib.contextmanager
def making(place):
    """Open a file for writing that takes its name when it is whole.  Yields the binary file."""
    part = place.with_name(f"{place.name}.partial-{os.urandom(6).hex()}")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)


class Source:
    """Pairs whose places are known from an index file, mapped into memory and shared by all processes.

    A subclass says how the index is made.  mine: which of its files are used; first, count: rows of each part, which
    the order moves as one; damage: sentences; read(row) -> (bytes of the picture's file, captions), one of BAD_IMAGE
    where the pair cannot be used.
    """

    def __init__(self, path, folder):
        self.path, self.folder, self._open = Path(path), os.path.abspath(folder), {}

    def __len__(self):
        return int(self.count.sum())

    def at(self, name):
        """The path of a name in the index: by the letters, as relpath makes them, also where folders are links."""
        return os.path.normpath(os.path.join(self.folder, name))

    def stamp(self, name):
        """What must be as it was for a file's rows to be right: its size and time; -1 where it is missing."""
        try:
            stat = os.stat(self.at(name))
        except (OSError, ValueError):
            return -1, -1
        return stat.st_size, stat.st_mtime_ns

    def stamps(self):
        """{file: stamp} of the index."""
        return {os.fsdecode(file["name"]): file.item()[1:3] for file in self.files}

    def load(self, place):
        """Read the index at `place` (None: there is none): sets header, files and rows.  -> whether it is whole."""
        try:
            with open(place or os.devnull, "rb") as file:
                self.header = json.loads(file.readline())
                if (self.header["version"], self.header["kind"]) != (INDEX_VERSION, type(self).__name__):
                    return False
                self.files = np.load(file)
                np.lib.format.read_magic(file)
                (n,), _, dtype = np.lib.format.read_array_header_1_0(file)
                self._map = place, os.fstat(file.fileno()).st_ino, file.tell(), n
                self.rows = self._mapped(file)
        except (OSError, ValueError, KeyError, EOFError, TypeError, SyntaxError, tokenize.TokenError):
            return False  # none, cut off or spoilt (the last two: numpy's header): made anew
        return dtype == ROW

    def _mapped(self, file):
        offset, n = self._map[2:]
        return np.memmap(file, ROW, "r", offset, (n,)).view(np.ndarray) if n else np.zeros(0, ROW)

    def save(self, stamps, counts, chunks, **header):
        """Write {file: stamp}, the number of rows of each file and the rows.  -> where the index lies"""
        files = [(os.fsencode(name), *stamp, count) for (name, stamp), count in zip(stamps.items(), counts)]
        kind = [("name", f"S{max(len(row[0]) for row in files)}"), ("size", "<i8"), ("time", "<i8"), ("count", "<i8")]
        place = to_make(self.path, ".index")
        with making(place) as file:
            header = dict(version=INDEX_VERSION, kind=type(self).__name__, **header)
            file.write(json.dumps(header).encode() + b"\n")
            np.save(file, np.array(files, kind))
            np.lib.format.write_array_header_1_0(file, dict(descr=np.lib.format.dtype_to_descr(ROW),
                                                            fortran_order=False, shape=(sum(map(len, chunks)),)))
            for chunk in chunks:
                file.write(chunk.tobytes())
        return place

    def __getstate__(self):  # what a process that starts afresh gets: it maps the index itself
        return {**self.__dict__, "rows": None, "_open": {}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        with open(self._map[0], "rb") as file:
            if os.fstat(file.fileno()).st_ino != self._map[1]:
                raise OSError(f"{self._map[0]} was written anew by another program: start again")
            self.rows = self._mapped(file)

    def read_skip_list(self):
        """Sets skip, {file's number: offsets of texts}: what `data.py check` found, in files as they were."""
        self.skip, stamps = {}, self.stamps()
        if place := made(self.path, ".skip"):
            numbers = {name: number for number, name in enumerate(stamps)}
            for line in place.read_text("utf-8").splitlines():
                name, *stamp, offset, _ = json.loads(line)
                if stamps.get(name) == tuple(stamp):
                    self.skip.setdefault(numbers[name], set()).add(offset)

    def place(self, row):
        """Where a pair's text lies, by which the skip list and messages name it.  -> file's number, offset"""
        number, _, _, offset, _, kind = self.rows[row].item()
        return 0 if kind >= OWN_FILE else number, offset

    def file_name(self, number):
        return self.at(os.fsdecode(self.files["name"][number]))

    def bytes(self, number, offset, size):
        """Read from a file by its number; the last 64 files stay open, since opening is slow on network disks."""
        if number not in self._open:
            if len(self._open) >= 64:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[number] = os.open(self.file_name(number), os.O_RDONLY)
        content = os.pread(self._open[number], size, offset)
        if len(content) < size:
            raise OSError(f"{self.file_name(number)} is shorter than it was when it was indexed")
        return content


def load_json(text):
    """json.loads whose every failure is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("json nested too deeply") from error


def captions_of(fields):
    """The TEXT_FIELDS of a record that are not empty.  Raises ValueError where there is none."""
    if not isinstance(fields, dict):
        raise ValueError("the record is no list of named fields")
    values = []
    for name in TEXT_FIELDS:
        value = fields.get(name)
        values += value if isinstance(value, list) else [value]
    found = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    if not found:
        raise ValueError("empty caption")
    return found


class Shards(Source):
    """Tar shards of one folder: KEY.jpg|jpeg|png|webp with KEY.txt, else with the TEXT_FIELDS of KEY.json.

    Only headers are read, in parallel, and only of shards that are new or have changed.  A shard that is cut off gives
    the pairs before the cut, and `damage` names it.
    """

    def __init__(self, folder, names):
        super().__init__(Path(folder) / "pairs", folder)
        place = made(self.path, ".index")
        for _ in range(5):  # until the index has all: another run may have written its own in the meantime
            kept, damage, chunks = {}, {}, []
            if self.load(place):
                kept = {name: stamp for name, stamp in self.stamps().items() if self.stamp(name) == stamp}
            new = {name: self.stamp(name) for name in names if name not in kept}
            if not new:
                break
            found = in_parallel(partial(_scan_shard, self.folder), list(new), "reading headers of shards")
            if kept:
                ends = np.cumsum(self.files["count"])
                chunks = [self.rows[end - file["count"]:end].copy() for file, end in zip(self.files, ends)
                          if os.fsdecode(file["name"]) in kept]
                damage = {name: line for name, line in self.header["damage"].items() if name in kept}
            chunks += [rows for rows, _ in found]
            for number, chunk in enumerate(chunks):
                chunk["file"] = number
            damage |= {name: line for name, (_, line) in zip(new, found) if line}
            place = self.save(kept | new, list(map(len, chunks)), chunks, damage=damage)
        else:
            raise ValueError(f"{self.at(next(iter(new)))} changes while it is read: wait until it is written")
        number = {name: i for i, name in enumerate(self.files["name"].tolist())}
        self.mine, ends = [number[os.fsencode(name)] for name in names], np.cumsum(self.files["count"])
        self.count = self.files["count"][self.mine]
        self.first = ends[self.mine] - self.count
        self.damage = [f"{os.path.join(self.folder, name)} {self.header['damage'][name]}" for name in names
                       if name in self.header["damage"]]
        packed = Path(folder) / "pack.json"
        if packed.is_file() and '"done": false' in packed.read_text("utf-8", "replace"):
            self.damage.append(f"{folder} is not packed to the end: the same data.py pack goes on")
        self.read_skip_list()

    def __str__(self):
        return self.folder

    def texts(self, row):
        """The captions of a row, one of which is drawn at each visit.  Raises ValueError where there is none."""
        number, _, _, offset, size, kind = self.rows[row].item()
        raw = self.bytes(number, offset, size).decode("utf-8-sig", "replace")
        return captions_of(load_json(raw) if kind == JSON else dict(text=raw))

    def read(self, row):
        """-> bytes of the picture's file, captions.  Raises one of BAD_IMAGE where the pair cannot be used."""
        number, offset, size, *_ = self.rows[row].item()
        return self.bytes(number, offset, size), self.texts(row)


def _scan_shard(folder, name):
    """One shard's rows, from its headers, and what is wrong with it, or ""."""
    images, captions, damage = {}, {}, ""
    try:
        with tarfile.open(os.path.join(folder, name), "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                suffix, place = suffix.lower(), (member.offset_data, member.size)
                if not member.isreg() or os.path.basename(key).startswith("._") or member.size >= 2 ** 32:
                    continue  # ._NAME: what macOS adds to each file
                if "." + suffix in IMAGE_SUFFIXES:
                    images[key] = place
                elif suffix == "txt" or suffix == "json" and key not in captions:
                    captions[key] = (*place, JSON if suffix == "json" else TXT)
                tar.members = []  # else it keeps every header
            tar.fileobj.seek(tar.offset)  # iterating ends in silence where a header is cut off or spoilt
            if len(block := tar.fileobj.read(512)) < 512 or any(block):
                damage = "is damaged (it ends early): the pairs before the damage are used"
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        damage = f"is damaged ({error}): the pairs before the damage are used"
    if not damage and (lonely := len(images.keys() ^ captions.keys())):
        damage = f"holds {lonely} pictures or captions that have no partner and are left out"
    return np.array([(0, *place, *captions[key]) for key, place in images.items() if key in captions], ROW), damage


class Table(Source):
    """A table of pictures and captions: a path among IMAGE_FIELDS, and TEXT_FIELDS, or "class" for templates.

    CSV, TSV (without quotes) and JSONL are read where they lie.  COCO's captions json, SLIP's pickles (.pkl and .npy:
    no code in them is run) and a folder of class folders are first written out as JSONL.  Paths are relative to the
    table's folder, to images/ or the split's folder in it, or to the same above it; PATH.zip/MEMBER lies in a zip
    (SLIP's YFCC100M).  Classes are named by words.txt (KEY, tab, "name, synonym") or by themselves; templates.txt
    holds the templates.
    """

    def __init__(self, path):
        path = Path(os.path.abspath(path))
        super().__init__(path, path.parent)
        self.classes, self.suffix = path.is_dir(), path.suffix.lower()
        if not self.classes and self.suffix not in (*TABLES, ".json"):
            raise ValueError(f"{path} is no table: wanted is a file {', '.join(TABLES)} or COCO's captions .json")
        listed = self.classes or self.suffix in (".json", ".pkl", ".npy")
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if self.classes else []
        origin = [self.stamp(name) for name in [path.name, *(f"{path.name}/{folder}" for folder in folders)]]
        origin = zlib.crc32(repr(origin).encode())
        self.suffix = ".jsonl" if listed else self.suffix
        if not (self.load(made(path, ".index")) and self.header["origin"] == origin and
                all(self.stamp(name) == stamp for name, stamp in self.stamps().items()) and
                os.path.isfile(self.at(os.path.join(self.header["home"], self.header["example"])))):
            table = path
            if listed:
                table = to_make(path, ".listing")
                with making(table) as file:
                    file.writelines(_class_lines(path, folders) if self.classes else _record_lines(path))
            self.load(self._scan(table, origin))
        self.mine, self.columns, self.damage = slice(None), self.header["columns"], self.header["damage"]
        self.home = self.at(self.header["home"])
        home = path if self.classes else path.parent
        self.templates, self.words = templates_of(home), {}
        if (file := home / "words.txt").is_file():
            lines = file.read_text("utf-8", "replace").splitlines()
            self.words = dict(line.split("\t", 1) for line in lines if "\t" in line)
        self.first = np.arange(0, len(self.rows), PART)
        self.count = np.diff(np.append(self.first, len(self.rows)))
        self.read_skip_list()

    def __str__(self):
        return str(self.path)

    def _scan(self, table, origin):
        """Find where each record begins, and for pictures in zips where they lie there.  -> where the index lies"""
        rows, chunks, zips, numbers, lost = [], [], {}, {}, 0
        stamp = self.stamp(table)
        with open(table, "rb") as file, tqdm(total=os.path.getsize(table), desc=f"reading {table.name}", unit="B",
                                             unit_scale=True, disable=None, leave=False) as bar:
            self.columns = None
            if self.suffix != ".jsonl":
                self.columns = self.cells(file.readline().decode("utf-8-sig", "replace"))
                if not set(self.columns) & set(IMAGE_FIELDS) or not set(self.columns) & {*TEXT_FIELDS, "class"}:
                    raise ValueError(f"{table}: its first line must name the columns, the picture's path as one of "
                                     f"{', '.join(IMAGE_FIELDS)}, captions as some of {', '.join(TEXT_FIELDS)} or "
                                     f"class; it is '{' | '.join(self.columns)[:200]}'")
            start = offset = file.tell()
            home, example = self._home(list(filter(None, map(self._image, islice(_records(file, self.suffix), 100)))))
            file.seek(start)
            for record in _records(file, self.suffix):
                row, offset = (0, 0, 0, offset, len(record), OWN_FILE), offset + len(record)
                bar.update(len(record))
                if b".zip" in record and ".zip/" in (name := self._image(record)):
                    outer, _, member = name.partition(".zip/")
                    outer = os.path.relpath(os.path.join(home, f"{outer}.zip"), self.folder)
                    if outer not in zips:
                        zips[outer] = self.stamp(outer)
                        numbers[outer] = len(zips)
                    place = _zip_members(self.at(outer), zips[outer]).get(member)
                    if place is None:
                        lost += 1
                        continue
                    row = (numbers[outer], *place[:2], *row[3:5], place[2])
                if record.strip():
                    rows.append(row)
                if len(rows) == 2 ** 16:
                    chunks, rows = [*chunks, np.array(rows, ROW)], []
        stamps = {os.path.relpath(table, self.folder): stamp} | zips
        damage = [f"{self.path}: {lost} pictures are not in their zips, and are left out"] if lost else []
        return self.save(stamps, [0] * len(stamps), [*chunks, np.array(rows, ROW)], columns=self.columns,
                         home=os.path.relpath(home, self.folder), example=example, damage=damage, origin=origin)

    def _home(self, names):
        """The folder to which the paths of the first records' pictures are relative, and one that is there.

        Raises FileNotFoundError where none is.
        """
        split = self.path.stem.split("_")[-1]  # COCO: captions_train2017.json, train2017/
        homes = [self.path] if self.classes else [
            folder / part for folder in (self.path.parent, self.path.parent.parent) for part in ("", "images", split)]
        for home in homes:
            for name in names:
                outer, inner, _ = name.partition(".zip/")
                if os.path.isfile(home / (f"{outer}.zip" if inner else name)):
                    return home, f"{outer}.zip" if inner else name
        if not names:
            raise FileNotFoundError(f"no pairs in {self.path}: no record that names a picture")
        raise FileNotFoundError(f"{self.path}: none of its first {len(names)} pictures ({', '.join(names[:2])}, ...) "
                                f"is there; looked in {', '.join(map(str, homes))}")

    def cells(self, text):
        """A line of a CSV or TSV table -> list of str.  Raises ValueError."""
        text = text.rstrip("\r\n")
        try:
            return text.split("\t") if self.suffix == ".tsv" else next(csv.reader(io.StringIO(text, newline="")), [])
        except csv.Error as error:
            raise ValueError(str(error)) from error

    def fields(self, record):
        """A record's bytes -> {column: value}.  Raises ValueError where it cannot be read or names no picture."""
        text = record.decode("utf-8-sig", "replace")
        fields = load_json(text) if self.columns is None else dict(zip(self.columns, self.cells(text)))
        image = isinstance(fields, dict) and next((fields[name] for name in IMAGE_FIELDS if fields.get(name)), None)
        if not isinstance(image, str):
            raise ValueError(f"the record names no picture ({', '.join(IMAGE_FIELDS)})")
        return fields | dict(image=image) | (dict({"class": os.path.dirname(image)}) if self.classes else {})

    def _image(self, record):
        try:
            return self.fields(record)["image"]
        except ValueError:
            return ""  # a bad pair, when it is drawn

    def captions(self, fields):
        """A record's captions, or its class in each of the templates.  Raises ValueError where there is none."""
        name = fields.get("class")
        if not isinstance(name, str) or not name:
            return captions_of(fields)
        names = self.words.get(name, name.replace("_", " ")).split(", ")
        return [template.replace("{}", name) for name in names for template in self.templates]

    def texts(self, row):
        """The captions of a row, one of which is drawn at each visit.  Raises ValueError where there is none."""
        return self.captions(self.fields(self.bytes(0, *self.rows[["text", "text_size"]][row].item())))

    def read(self, row):
        """-> bytes of the picture's file, captions.  Raises one of BAD_IMAGE where the pair cannot be used."""
        number, start, size, offset, length, kind = self.rows[row].item()
        fields = self.fields(self.bytes(0, offset, length))
        captions = self.captions(fields)
        if kind == OWN_FILE:
            path = Path(self.home, fields["image"])
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}")
            return path.read_bytes(), captions
        head = self.bytes(number, start, 30)  # the member's own header: names and extras of any length follow
        content = self.bytes(number, start + 30 + sum(struct.unpack("<HH", head[26:])), size)
        if kind == ZIP_DEFLATED:
            content = zlib.decompressobj(-15).decompress(content, 2 ** 28)  # no picture is larger
        return content, captions


def _records(file, suffix):
    """The records of a table, as bytes; those of CSV may hold line ends in quotes.  Raises ValueError."""
    if suffix != ".csv":
        yield from iter(file.readline, b"")  # "yield from file" would close the file with this generator
        return
    taken = []

    def lines():
        for line in file:
            taken.append(line)
            yield line.decode("utf-8", "replace")
    try:
        for _ in csv.reader(lines()):
            yield b"".join(taken)
            taken.clear()
    except csv.Error as error:  # a field larger than csv's limit: a quote that is never closed
        start = b"".join(taken)[:80].decode("utf-8", "replace")
        raise ValueError(f"{file.name}: cannot read the record '{start}...': {error}") from error


@lru_cache(64)
def _zip_members(path, stamp):
    """{name: (offset of its header, size, kind)} of a zip; none where it is missing or damaged.  stamp: of the file."""
    try:
        with zipfile.ZipFile(path) as file:
            return {member.filename: (member.header_offset, member.compress_size,
                                      ZIP_DEFLATED if member.compress_type else ZIP_STORED)
                    for member in file.infolist() if member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                    and member.compress_size < 2 ** 32}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return {}


def _class_lines(folder, classes):
    """The pictures in class folders as JSONL, in an order without classes: neighbours are read together."""
    found = [f"{name}/{path.name}" for name in tqdm(classes, f"listing {folder}", disable=None, leave=False)
             for path in picture_files(folder / name)]
    return (json.dumps(dict(image=found[i])).encode() + b"\n"
            for i in np.random.default_rng(0).permutation(len(found)))


def _record_lines(path):
    """COCO's captions json, SLIP's yfcc15m.pkl or cc3m.npy as JSONL.  Raises ValueError."""
    try:
        if path.suffix.lower() == ".json":
            content, captions = load_json(path.read_bytes()), {}
            for note in content["annotations"]:
                captions.setdefault(note["image_id"], []).append(note["caption"])
            records = (dict(image=image["file_name"], captions=captions[image["id"]]) for image in content["images"]
                       if image["id"] in captions)
        else:
            records = map(_slip_record, load_plain_pickle(path))
        return [json.dumps(record).encode() + b"\n" for record in records]
    except (KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no COCO captions json and no list of (number, title, description) or of "
                         f"{{image_id, captions}} as SLIP's ({type(error).__name__}: {error})") from error


def _slip_record(record):
    if isinstance(record, dict):  # cc3m.npy: image_id is a path; cc12m.npy has image_name
        return dict(image=str(record.get("image_name", record.get("image_id"))), captions=list(record["captions"]))
    number, *captions = record  # yfcc15m.pkl: line of YFCC100M's table
    return dict(image=yfcc_zip(number), captions=captions)


def yfcc_zip(number):
    """SLIP's place of a picture of YFCC100M: image 12345678 is images/12/345.zip/678.jpg."""
    digits = f"{int(number):08d}"
    return f"images/{digits[:-6]}/{digits[-6:-3]}.zip/{digits[-3:]}.jpg"


class _Plain(pickle.Unpickler):
    """Lists, tuples, dicts, strings, numbers, and numpy's arrays of such: nothing in the file can name a function."""

    class Array:
        """Stands for numpy's array: keeps the items that its state holds."""

        def __setstate__(self, state):
            self.items = state[-1]

    class Type(Array):
        """Stands for numpy's dtype: keeps its code."""

        def __init__(self, code, *_):
            self.code = code

    def find_class(self, module, name):
        """What stands for numpy's constructors, whoever asks; UnpicklingError for all else."""
        plain = dict(_reconstruct=lambda *_: self.Array(), ndarray=None, dtype=self.Type,
                     scalar=lambda kind, raw: np.frombuffer(raw, str(np.dtype(kind.code)))[0].item())
        if name not in plain:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no plain value: it is not loaded")
        return plain[name]


def load_plain_pickle(path):
    """A .pkl, or a .npy of objects, without running code.  Raises UnpicklingError for all but plain values."""
    with open(path, "rb") as file:
        if path.suffix == ".npy":
            np.lib.format.read_magic(file)
            if not np.lib.format.read_array_header_1_0(file)[2].hasobject:
                raise ValueError("an array of numbers")
        content = _Plain(file, encoding="latin1").load()  # Python 2's text and bytes are one kind
    return content.items if isinstance(content, _Plain.Array) else content


class Pairs:
    """The pairs of several data sets as one collection: names or paths as --data takes them, NAME:2 is taken twice.

    pairs[epoch, index] -> (bytes of a picture's file, captions), index < len(pairs); raises one of BAD_IMAGE.
    A source of n pairs and weight w holds w * n places of each epoch, and goes on where it stopped in the last: with
    0.5 each pair is seen every other epoch.  sizes: places of each part, for Order; damage: sentences.
    """

    def __init__(self, names, root="data"):
        self.sources, self.sizes, starts, self.damage = [], [], [], []
        for name in names:
            place, _, weight = name.rpartition(":")
            if not re.fullmatch(r"-?[\d.]+", weight) or Path(name).exists() or Path(root, name).exists():
                place, weight = name, 1
            if not 0 < float(weight) < 1000:
                raise ValueError(f"the weight in --data {name} must be more than 0 and less than 1000")
            folders, sources = {}, []
            for where in (locate(one, root) for one in expand(place)):
                if isinstance(where, list):
                    for path in where:
                        folders.setdefault(path.parent, []).append(path.name)
                else:
                    sources.append(Table(where))
            sources += [Shards(folder, shards) for folder, shards in folders.items()]
            damage = [line for source in sources for line in source.damage]
            if sum(map(len, sources)) * float(weight) < 1:
                raise FileNotFoundError(f"no pairs in {name}: no picture ({', '.join(IMAGE_SUFFIXES)}) with a caption"
                                        + "".join(f"; {line}" for line in damage[:3]))
            for source in sources:
                n, copies = round(float(weight) * len(source)), float(weight)
                self.sizes.append(np.tile(source.count, int(copies)) if copies == int(copies) else
                                  np.diff(np.append(np.arange(0, n, PART), n)))
                starts.append(n)
            self.sources, self.damage = self.sources + sources, self.damage + damage
        self.sizes = np.concatenate(self.sizes)
        self.starts = np.cumsum([0, *starts]).tolist()  # of the sources' places
        self.ends = [np.cumsum(source.count) for source in self.sources]  # of their parts, in pairs

    def __len__(self):
        return self.starts[-1]

    def digest(self):
        """What must be equal for a run to see the same pairs in the same order: sizes and names of parts and files."""
        code = zlib.crc32(self.sizes.tobytes())
        for source in self.sources:
            code = zlib.crc32(repr(source.files[source.mine][["name", "size"]].tolist()).encode(), code)
        return f"{len(self)} pairs, {code:08x}"

    def find(self, epoch, index):
        """-> the source of a place in an epoch, and the row there."""
        number = bisect.bisect_right(self.starts, index) - 1
        source, ends = self.sources[number], self.ends[number]
        start, size = self.starts[number], self.starts[number + 1] - self.starts[number]
        pair = (index - start + epoch * size) % ends[-1]
        part = int(ends.searchsorted(pair, "right"))
        return source, int(source.first[part] + source.count[part] - ends[part] + pair)

    def __getitem__(self, key):
        source, row = self.find(*key)
        number, offset = source.place(row)
        if offset in source.skip.get(number, ()):
            raise Skipped("on the skip list")
        return source.read(row)

    def name(self, epoch, index):
        """Where a pair lies, for messages."""
        source, row = self.find(epoch, index)
        number, offset = source.place(row)
        return f"{source.file_name(number)} at byte {offset}"

    def captions(self, limit):
        """Captions of at most `limit` pairs, spread over all, to learn a vocabulary from."""
        n = len(self)
        for i in range(min(limit, n)):
            source, row = self.find(0, i * n // min(limit, n))
            try:
                yield from source.texts(row)
            except BAD_IMAGE:
                pass  # an empty or unreadable caption: counted when the pair is drawn


class Skipped(ValueError):
    """A pair that `data.py check` has listed: another takes its place, as of any bad pair, but it is not counted."""


# ---------------------------------------------------------------- order

class Order:
    """Which pair stands at which place of an epoch: a pure function of (seed, epoch, position).

    The parts (shards) are permuted, cut into groups of about `window` pairs, and the pairs of a group permuted: what is
    read together lies in a few shards, and memory grows with the shards, not with the pairs.
    """

    def __init__(self, sizes, seed, window=100_000):  # our choice: ten shards of 10,000, some 3 GB of pictures
        self.ends, self.seed, self.window = np.cumsum(sizes), seed, window
        self.sizes, self.n = np.asarray(sizes), int(self.ends[-1])
        self._epoch, self._group = None, None

    def _parts(self, epoch):
        """Permute the parts: their numbers, where each ends in the epoch, where each group's first part stands."""
        if self._epoch != epoch:
            self._epoch, self._group = epoch, None
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch], spawn_key=(0,)))
            self._order = rng.permutation(len(self.sizes))
            self._ends = np.cumsum(self.sizes[self._order])
            group = (self._ends - self.sizes[self._order]) // self.window
            self._firsts = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(group))

    def __call__(self, epoch, start, stop):
        """The indices (stop - start,) of the pairs at places start ... stop - 1 of an epoch."""
        self._parts(epoch)
        found = []
        while start < stop:
            part = np.searchsorted(self._ends, start, "right")
            group = int(np.searchsorted(self._firsts, part, "right")) - 1
            first, last = self._firsts[group], self._firsts[group + 1]
            begin, end = int(self._ends[first - 1]) if first else 0, int(self._ends[last - 1])
            if self._group is None or self._group[0] != group:
                rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch], spawn_key=(1, group)))
                places = begin + rng.permutation(end - begin)
                parts = np.searchsorted(self._ends[first:last], places, "right")
                shift = self.ends[self._order[first:last]] - self._ends[first:last]  # place in the epoch -> pair
                self._group = group, places + shift[parts]
            found.append(self._group[1][start - begin:min(stop, end) - begin])
            start = min(stop, end)
        return np.concatenate(found)


# ---------------------------------------------------------------- pictures and transforms: PIL in, PIL out

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # others start programs (EPS), or print what they think (TIFF)
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # what makes each of EXIF's orientations upright


def open_picture(content):
    """Bytes of a picture file -> PIL picture whose pixels are not decoded yet.  Raises one of BAD_IMAGE.

    More pixels than Pillow's limit (89 million) are an error: one such picture takes a worker's memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture ({', '.join(FORMATS)})") from error


def _orientation(image):
    """EXIF's, where it is one: 1 is upright, from 5 on width and height change places."""
    try:
        turn = image.getexif().get(0x0112, 1)
    except BAD_IMAGE:
        return 1  # damaged EXIF does not spoil the pixels
    return turn if isinstance(turn, int) and turn in TURNS else 1


def upright_size(image):
    """-> (width, height) as EXIF turns the picture."""
    return image.size[::-1] if _orientation(image) >= 5 else image.size


def decode(content, shrink=1.0):
    """Bytes of a picture file -> RGB picture: upright (EXIF), transparency on white, first frame, 16 bits as 8.

    `content` may also be open_picture's.  A JPEG that is to be shrunk that many times anyway is decoded at 1/2, 1/4 or
    1/8 of its size, never smaller than asked for.  Raises one of BAD_IMAGE.
    """
    image = open_picture(content) if isinstance(content, bytes) else content
    if shrink >= 2:
        image.draft(image.mode, [math.ceil(side / shrink) for side in image.size])  # only JPEGs can
    if (turn := _orientation(image)) != 1:
        image = image.transpose(TURNS[turn])
    if image.mode.startswith("I"):  # grey of 16 bits, which convert would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_box(width, height, scale, rng, ratio=(3 / 4, 4 / 3)):
    """Inception's crop as torchvision draws it: a share of the area in `scale`, an aspect in `ratio`.  -> x, y, w, h"""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # An extreme picture: the largest middle part of an allowed aspect.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def crop(image, box, size, full_size=None, resample=Image.BILINEAR):
    """A box of the picture, resized to a square.  full_size: what the box is measured on, if not image.size."""
    x, y, w, h = box
    kx, ky = (a / b for a, b in zip(image.size, full_size or image.size))
    return image.resize((size, size), resample, (kx * x, ky * y, kx * (x + w), ky * (y + h)))


def distort(image, rng):
    """SLIP's distortion of a SimCLR view: jitter (.4, .4, .4, .1) p .8, grey .2, blur (.1, 2) p .5, mirror .5."""
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


def center_crop(image, size, resample=Image.BICUBIC, short=None):
    """The evaluation view (CLIP): the shorter side resized to `short` (else `size`), then the middle square.

    As torchvision rounds.
    """
    image = image.resize([(short or size) * side // min(image.size) for side in image.size], resample)
    x, y = (round((side - size) / 2) for side in image.size)
    return image.crop((x, y, x + size, y + size))


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """uint8 pixels (..., H, W, 3) on any device -> float32 (..., 3, H, W)."""
    mean, std = (_channels(x, images.device)[:, None, None] for x in (mean, std))
    images = images.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return images.sub_(mean).div_(std)  # in place: new memory costs a CPU more than the arithmetic


@lru_cache
def _channels(values, device):
    """Shares of 255 as a tensor, made once: to put one on a GPU is to wait for it."""
    return torch.tensor(values, device=device) * 255


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
    missing = hidden
    while missing:
        for a, b, c, d in rng.random((16, 4)).tolist():  # one call for many numbers: this runs once a sample
            area = smallest + a * (max(smallest, missing) - smallest)
            aspect = math.exp((2 * b - 1) * math.log(1 / 0.3))  # BEiT: from 0.3 to 1 / 0.3
            h = min(rows, max(1, round(math.sqrt(area * aspect))))
            w = min(columns, max(1, round(math.sqrt(area / aspect))))
            y, x = int(c * (rows - h + 1)), int(d * (columns - w + 1))
            block = mask[y:y + h, x:x + w]
            new = min(missing, h * w - np.count_nonzero(block))
            if new == missing:
                block[np.unravel_index(np.flatnonzero(~block)[:new], block.shape)] = True
                return mask.ravel()
            block[:] = True
            missing -= new
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
        self._rings = {}

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        epoch, index = key
        rng, bad, skipped = np.random.default_rng([self.config.seed, epoch, index]), [], 0
        while True:
            try:
                return dict(self.sample(epoch, index, rng), bad=bad)
            except BAD_IMAGE as error:
                if isinstance(error, Skipped):
                    skipped += 1
                else:
                    bad.append(f"{self.pairs.name(epoch, index)}: {error}")
                if len(bad) == 20 or skipped == 1000:  # our choice
                    raise ValueError(f"{len(bad)} bad pairs in a row and {skipped} on the skip list, the data is "
                                     f"damaged: {'; '.join(bad[:3])}") from error
                index = int(rng.integers(len(self.pairs)))

    def sample(self, epoch, index, rng):
        """One pair as the method wants it.  Raises one of BAD_IMAGE."""
        content, captions = self.pairs[epoch, index]
        image, size = open_picture(content), self.shape.image_size
        full, caption = upright_size(image), captions[int(rng.integers(len(captions))) if len(captions) > 1 else 0]
        # All boxes are drawn before the picture is decoded, so that it is decoded no larger than they need.
        smallest = [self.config.crop_min] * ("images" in self.needs) + [0.08] * 2 * ("views" in self.needs)  # .08: SLIP
        boxes = [crop_box(*full, (share, 1.0), rng) for share in smallest]
        image = decode(image, min(min(w, h) for _, _, w, h in boxes) / size)
        crops = [crop(image, box, size, full) for box in boxes]
        sample = dict(caption=caption, rng=rng)
        if "images" in self.needs:
            sample["images"] = np.asarray(crops.pop(0))
        if "views" in self.needs:
            sample["views"] = np.stack([distort(view, rng) for view in crops])
        return sample

    def collate(self, samples):
        """A list of samples -> a batch of tensors, texts as long as the longest; "bad" is one list.

        With --compile that length is a multiple of 8, or the longest there is: each other one would compile all anew.
        Masks are drawn here, each from its sample's rng: in a row they take half the time of one after each picture.
        """
        arrays = {name: [sample[name] for sample in samples] for name in ("images", "views") if name in self.needs}
        side, length, rngs = self.shape.grid, self.shape.context_length, [sample["rng"] for sample in samples]
        if "mask" in self.needs:
            masks = [block_mask((side, side), self.config.mask_ratio, rng) if self.config.mask == "block" else
                     random_mask(side * side, self.config.mask_ratio, rng) for rng in rngs]
            arrays["ids_keep"] = [np.flatnonzero(~mask) for mask in masks]
            arrays["ids_hide"] = [np.flatnonzero(mask) for mask in masks]
        batch = {name: self._lend(name, rows) if torch.utils.data.get_worker_info() else
                 torch.from_numpy(np.stack(rows)) for name, rows in arrays.items()}
        batch["bad"] = [line for sample in samples for line in sample["bad"]]
        if "text" in self.needs:
            tokens = self.tokenizer([sample["caption"] for sample in samples], length)                         # (B, L)
            more = min(length, -(-tokens.size(1) // 8) * 8) - tokens.size(1) if self.config.compile else 0
            batch["tokens"] = F.pad(tokens, (0, more))
        if "mlm" in self.needs:
            draws = torch.from_numpy(np.stack([rng.random(length) for rng in rngs]))
            chosen = _mlm_mask(batch["tokens"] == self.tokenizer.eot, self.config.mlm_ratio, draws)             # (B, L)
            batch["mlm_tokens"] = batch["tokens"].masked_fill(chosen, self.tokenizer.mask)
            batch["mlm_ids"] = chosen.flatten().nonzero()[:, 0]                  # (R,) places in the flattened (B, L)
            batch["mlm_targets"] = batch["tokens"].flatten()[batch["mlm_ids"]]   # (R,)
        return batch

    def _lend(self, name, arrays):
        """Stack arrays in shared memory that this worker uses in turn: fresh pages cost a tenth of a batch's time."""
        ring = self._rings.setdefault(name, [])
        if len(ring) < RING or len(ring[0]) != len(arrays):
            ring.append(torch.from_numpy(np.stack(arrays)).share_memory_())
        else:
            ring.append(ring[-RING])
            np.stack(arrays, out=ring[-1].numpy())
        del ring[:-RING]
        return _Lent(ring[-1])


RING = 3  # one more than the batches that a DataLoader asks a worker for before it has received the first (2)


class _Lent:
    """A tensor in shared memory that its worker will fill again: who receives it gets a copy."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        return torch.clone, (self.tensor,)


def _mlm_mask(is_end, ratio, draws):
    """Which tokens to mask: of those between start and end a share `ratio`, at least one if there is any.

    is_end (B, L) bool, draws (B, >= L) in [0, 1): the lowest are taken.  -> bool (B, L)
    """
    inner = is_end.int().argmax(1, keepdim=True) - 1                                   # (B, 1) tokens between
    place = torch.arange(is_end.size(1))                                               # (L,)
    draws = draws[:, :is_end.size(1)].masked_fill((place < 1) | (place > inner), 2.0)
    return draws.argsort(1).argsort(1) < torch.minimum(inner, (ratio * inner).round().clamp(min=1))


class GlobalBatches(torch.utils.data.Sampler):
    """The (epoch, index) keys of this rank's share of each global batch, from global step `first` to the last.

    Epochs follow one another without a gap: step s takes places s * B ... (s + 1) * B - 1 of that stream, and no pair
    is left out.  Rank r of W takes rows r * B/W ... (r + 1) * B/W - 1, so the global batches do not depend on W.
    """

    def __init__(self, order, batch_size, first, last, rank=0, world=1):
        self.order, self.batch_size, self.first, self.last = order, batch_size, first, last
        self.share = range(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        for step in range(self.first, self.last):
            keys, place = [], step * self.batch_size + self.share.start
            while len(keys) < len(self.share):
                epoch, start = divmod(place, self.order.n)
                indices = self.order(epoch, start, min(self.order.n, start + len(self.share) - len(keys)))
                keys, place = keys + [(epoch, index) for index in indices.tolist()], place + len(indices)
            yield keys


# ---------------------------------------------------------------- evaluation sets

PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass
class TestSet:
    """Labelled pictures to evaluate on (or to train a linear probe on)."""
    name: str               # prompts.json's, or as given
    place: Path             # where they were found
    pictures: list          # each a path, (zip, name in it), or uint8 pixels (H, W) or (H, W, 3)
    targets: torch.Tensor   # (n,) class numbers, or (n, C) of 0 and 1 where a picture may show several classes
    names: list             # of each class its names, the first being the one to say
    templates: list         # sentences with {} for the name
    metric: str = ""        # the protocol's, for the sets of prompts.json
    squash: bool = False    # resized to a square instead of cropped (KITTI in ELEVATER)
    remarks: tuple = ()     # sentences that belong to the score


@lru_cache
def prompts():
    """prompts.json: "sets", {name: metric, sizes, folders, templates, classes in order, labels}, and "paper"."""
    return json.loads(PROMPTS.read_text("utf-8"))


def protocols():
    """The sets of prompts.json: ICinW's twenty and ImageNet."""
    return prompts()["sets"]


def _plain(text):
    """A spelling without case, spaces and hyphens."""
    return "".join(c for c in str(text).lower() if c.isalnum())


def homes(name, root):
    """Where the set NAME is looked for: its folders of prompts.json under root, or NAME under root; and the path."""
    facts = protocols().get(known_name(name), {})
    return list(dict.fromkeys([*(Path(root, folder) for folder in facts.get("folders", [name])), Path(name)]))


def known_name(name):
    """prompts.json's name for NAME, which may be spelled as one of its folders; else NAME."""
    return next((key for key, facts in protocols().items() if _plain(name) in map(_plain, facts["folders"])), name)


def test_set(name, root="data", split="test", names=None):
    """The classification set NAME (of prompts.json, or a folder under root), or the path NAME.  -> TestSet

    Layouts: ELEVATER's index and zips, CIFAR's batches, MNIST's idx, ImageNet's flat validation pictures with the
    development kit, class folders.  names: a file of lines FOLDER<tab>NAME for class folders, else their words.txt.
    Raises FileNotFoundError that says what was looked for, and ValueError where classes are missing, unknown, or in
    another order than the protocol's: no score is better than a wrong one.
    """
    if name == "demo":
        draw_demo(Path(root) / "demo")
    name, places = known_name(name), homes(name, root)
    facts = protocols().get(name, {})
    layouts = (_elevater, _cifar, _mnist, _devkit, _sorted_folders)
    home, found = next(((home, found) for home in places if home.is_dir() for layout in layouts
                        if (found := layout(home, split, facts))), (None, None))
    if not found:
        wanted = ("ELEVATER's index and zips, CIFAR's batches, MNIST's idx files, ImageNet's val/ with the development "
                  "kit or " if facts else "") + "class folders with pictures"
        raise FileNotFoundError(f"no {split} set '{name}': looked for {wanted} in {', '.join(map(str, places))} "
                                "(--root or $MASKCLIP_DATA name another place)")
    place, pictures, labels, own, by_name = found
    remarks = []
    if facts:
        if names:
            raise ValueError(f"--names is for class folders of your own: the names of {name} are its protocol's")
        spoken = [_listed(one) for one in facts["classes"]]
        numbers = (_numbers_by_name if by_name else _numbers_in_order)(place, facts, own, remarks)
        if len(pictures) != facts[split]:
            remarks.append(f"{len(pictures):,} {split} pictures, the protocol has {facts[split]:,}")
    else:
        said = _words(Path(names or _beside(place, home, "words.txt")), own, bool(names))
        spoken = [[said.get(label, label.replace("_", " "))] for label in own]
        numbers = list(range(len(own)))
    several = facts.get("metric") == "11point_mAP"
    for picture, classes in zip(pictures, labels, strict=True):
        if not classes or len(classes) > 1 and not several or not all(0 <= k < len(numbers) for k in classes):
            raise ValueError(f"{place}: {picture_name(picture)} has the labels {classes}, of {len(numbers)} classes "
                             "counted from 0")
    if empty := sorted(set(range(len(spoken))) - {numbers[label] for classes in labels for label in classes}):
        raise ValueError(f"{place}: no picture of {len(empty)} of {len(spoken)} classes: "
                         + ", ".join(spoken[k][0] for k in empty[:5]))
    if several:
        targets = torch.zeros(len(pictures), len(spoken), dtype=torch.long)
        for row, classes in zip(targets, labels, strict=True):
            row[[numbers[label] for label in classes]] = 1
    else:
        targets = torch.tensor([numbers[label] for label, in labels])
    templates = facts.get("templates") or templates_of(_beside(place, home, "templates.txt").parent)
    return TestSet(str(name), place, pictures, targets, spoken, templates, facts.get("metric", ""),
                   facts.get("squash", False), tuple(remarks))


def _beside(place, home, name):
    """A set's own file: among its class folders, or in the folder that was named."""
    return next((file for file in (place / name, home / name) if file.is_file()), place / name)


def _listed(one):
    return [one] if isinstance(one, str) else one


def _spellings(facts):
    """{spelling: the classes that it may stand for, the likeliest first}."""
    rows = [[*_listed(one), *_listed(label)] for one, label in
            zip(facts["classes"], facts.get("labels", [[]] * len(facts["classes"])), strict=True)]
    known = {}
    for column in zip_longest(*rows):
        for k, spelling in enumerate(column):
            if spelling is not None:
                known.setdefault(_plain(spelling), []).append(k)
    return known


def _numbers_in_order(place, facts, own, remarks):
    """Classes that an index numbers: its list of labels must be in the protocol's order.  -> list of int"""
    count, known = len(facts["classes"]), _spellings(facts)
    if own is None:
        remarks.append("no labels.txt: the order of the classes was not checked")
        return list(range(count))
    if len(own) != count:
        raise ValueError(f"{place} names {len(own)} classes: the protocol has {count}")
    unknown = [label for label in own if _plain(label) not in known]
    for k, label in enumerate(own):
        if label not in unknown and k not in known[_plain(label)]:
            raise ValueError(f"{place}: its classes are in another order than the protocol's: number {k} is '{label}' "
                             f"here and '{_listed(facts['classes'][k])[0]}' in prompts.json")
    if unknown:
        remarks.append(f"the order of {len(unknown)} of {count} classes was not checked: prompts.json does not know "
                       f"'{unknown[0]}'")
    return list(range(count))


def _numbers_by_name(place, facts, own, remarks):
    """Classes that the data set names, in whatever order; or their numbers, from 0 or 1.  -> list of int"""
    count, known = len(facts["classes"]), _spellings(facts)
    if all(label.isdigit() for label in own):
        first = min(map(int, own))
        numbers = [int(label) - min(first, 1) for label in own]
        if not known.keys() >= set(own):
            remarks.append("the classes are called by numbers: their order was not checked")
    else:
        if unknown := [label for label in own if _plain(label) not in known]:
            raise ValueError(f"{place}: {len(unknown)} of {len(own)} classes are unknown to prompts.json, the first is "
                             f"'{unknown[0]}'; it knows {', '.join(list(known)[:3])} ...")
        numbers = [known[_plain(label)][0] for label in own]
    missing = sorted(set(range(count)) - set(numbers))
    if missing or len(own) != count:
        raise ValueError(f"{place}: {len(own)} classes, and the protocol has {count}; missing: "
                         + (", ".join(_listed(facts["classes"][k])[0] for k in missing[:5]) or "none"))
    return numbers


def _words(file, own, given):
    """{folder: name} of a names file.  Raises ValueError for a folder that is not there, or without a name."""
    if not given and not file.is_file():
        return {}
    lines = [line.split("\t") for line in file.read_text("utf-8").splitlines() if line.strip()]
    if wrong := [line for line in lines if len(line) != 2]:
        raise ValueError(f"{file}: '{wrong[0][0][:60]}' is no line FOLDER<tab>NAME")
    said = {folder: name.split(",")[0].strip() for folder, name in lines}
    if given and set(said) != set(own):
        odd = sorted(set(said) ^ set(own))
        raise ValueError(f"{file} and the class folders do not hold the same classes: {', '.join(odd[:5])}")
    return said


# The layouts: (folder, split, facts of prompts.json) -> None where it is another, or: place, pictures, labels (of each
# picture a list of int), the data set's own name of each label (or None), whether these may be in any order.

def _elevater(home, split, facts):
    """An index with pictures in zips: lines ZIP@PATH LABEL[,LABEL..], or a COCO json; as vision-datasets has them."""
    names = [f"{split}.txt", f"{split}_ic.txt", f"{split}_images.txt", f"{split}_meta.json", f"{split}.json"]
    if len(facts.get("classes", ())) == 1000:
        names = ["val.json" if split == "test" else "train.json"]
    for index in (home / name for name in names if (home / name).is_file()):
        text = index.read_text("utf-8", errors="replace")
        lines = text.split("\n")
        # not another project's list
        if '"categories"' in text if index.suffix == ".json" else re.fullmatch(r".+@.+\s\d+(,\d+)*\s*", lines[0]):
            break
    else:
        return None
    if index.suffix == ".txt":
        lines = [line for line in lines if line.strip()]
        rows = [re.fullmatch(r"(.+?)@(.+)\s(\d+(?:,\d+)*)", line.strip()) for line in lines]
        if None in rows:
            raise ValueError(f"{index}, line {rows.index(None) + 1}: not ZIP@PATH LABEL")
        pictures = [(home / row[1], row[2]) for row in rows]
        labels = [list(map(int, row[3].split(","))) for row in rows]
        listed = next((home / name for name in ("labels.txt", "labelmap.txt") if (home / name).is_file()), None)
        own = listed and [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
    else:
        try:
            content = load_json(index.read_bytes())
            kinds = sorted(content["categories"], key=lambda kind: kind["id"])
            number = {kind["id"]: k for k, kind in enumerate(kinds)}
            own, of = [kind["name"] for kind in kinds], {}
            for note in content["annotations"]:
                of.setdefault(note["image_id"], []).append(number[note["category_id"]])
            places = [image.get("zip_file", "") + "@" * ("zip_file" in image) + image["file_name"]
                      for image in content["images"]]
            pictures = [(home / folder, path) for folder, path in (place.split("@", 1) for place in places)]
            labels = [of[image["id"]] for image in content["images"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index} is no index of pictures and categories in COCO's form ({type(error).__name__}: "
                             f"{error})") from error
    if own is None and not facts:
        raise ValueError(f"no labels.txt in {home}: the names of the classes of {index} are not known")
    inside = {}
    for file, path in pictures:
        if file not in inside:
            inside[file] = set(_zip(str(file), os.getpid()).namelist())
        if path not in inside[file]:
            raise ValueError(f"{file} does not hold {path}, which {index} names")
    return index, pictures, labels, own, False


def _cifar(home, split, facts):
    """CIFAR's "python version": batches of 32 x 32 pixels, pickled by Python 2, whose constructors are not run."""
    home = next((f for f in (home, home / "cifar-10-batches-py", home / "cifar-100-python")
                 if (f / "batches.meta").is_file() or ((f / "meta").is_file() and (f / "test").is_file())), None)
    if home is None or not facts:
        return None
    hundred = (home / "meta").is_file()
    files = [split] if hundred else [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    pictures, labels = [], []
    try:
        own = load_plain_pickle(home / ("meta" if hundred else "batches.meta"))
        own = own["fine_label_names" if hundred else "label_names"]
        for name in files:
            batch = load_plain_pickle(home / name)
            raw = batch["data"].items
            pixels = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, np.uint8)
            pictures += list(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += [[label] for label in batch["fine_labels" if hundred else "labels"]]
    except (LookupError, TypeError, AttributeError, EOFError, ValueError, OverflowError, MemoryError,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{home} does not hold CIFAR's batches whole ({type(error).__name__}: {error})") from error
    if len(pictures) != len(labels):
        raise ValueError(f"{home}: {len(pictures)} pictures and {len(labels)} labels")
    return home, pictures, labels, own, True


def _mnist(home, split, facts):
    """MNIST's idx files, packed or not."""
    kind = "train" if split == "train" else "t10k"

    def content(folder, what):
        for name in (f"{kind}-{what}-ubyte", f"{kind}-{what}-ubyte.gz", f"{kind}-{what.replace('-', '.', 1)}-ubyte"):
            if (folder / name).is_file():
                raw = (folder / name).read_bytes()
                try:
                    return gzip.decompress(raw) if name.endswith(".gz") else raw
                except (OSError, EOFError, zlib.error) as error:
                    raise ValueError(f"{folder / name} is damaged ({error})") from error
        return None
    for folder in (home, home / "raw", home / "MNIST/raw") if facts else ():
        images, labels = content(folder, "images-idx3"), content(folder, "labels-idx1")
        if images is None or labels is None:
            continue
        magic, count, rows, columns = struct.unpack(">4I", images[:16].ljust(16, b"\0"))
        if magic != 2051 or len(images) != 16 + count * rows * columns or len(labels) != 8 + count:
            raise ValueError(f"{folder}: MNIST's {kind} files are damaged: {count} pictures of {rows} x {columns} "
                             f"announced, {len(images) - 16} pixels and {len(labels) - 8} labels there")
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(count, rows, columns)
        return folder, list(pixels), [[label] for label in labels[8:]], [str(k) for k in range(10)], False
    return None


def _devkit(home, split, facts):
    """ImageNet's validation pictures in one folder, and the labels of the development kit."""
    if len(facts.get("classes", ())) != 1000 or split != "test":
        return None
    flat = {folder: [path for path in picture_files(folder) if re.search(r"_val_\d{8}$", path.stem)]
            for folder in (home / "val", home / "ILSVRC2012_img_val", home) if folder.is_dir()}
    folder, pictures = next(((folder, paths) for folder, paths in flat.items() if paths), (None, None))
    if folder is None:
        return None
    kits = [home / part for part in ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")]
    kit = next((kit for kit in kits if (kit / "ILSVRC2012_validation_ground_truth.txt").is_file()), None)
    if kit is None or not (kit / "meta.mat").is_file():
        raise FileNotFoundError(f"{folder} holds pictures without class folders, and there is no development kit with "
                                f"ILSVRC2012_validation_ground_truth.txt and meta.mat in {', '.join(map(str, kits))}: "
                                "unpack ILSVRC2012_devkit_t12.tar.gz there")
    truth = list(map(int, (kit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()))
    places = [int(path.stem[-8:]) - 1 for path in pictures]
    if len(truth) != len(pictures) or places != list(range(len(truth))):
        raise ValueError(f"{folder} holds {len(pictures)} pictures, and the ground truth in {kit} {len(truth)} labels")
    return folder, pictures, [[label - 1] for label in truth], _wordnet_ids(kit / "meta.mat", facts["labels"]), True


def _wordnet_ids(path, expected):
    """The WordNet ids in the order of the development kit's labels 1 to 1,000, which is not that of the ids.

    meta.mat is a MATLAB 5 file: 128 bytes, then elements (kind, size, content), packed by zlib where kind is 15.  Its
    records stand in the order of their number, each with its id in ASCII or UTF-16.
    """
    raw, text = path.read_bytes(), b""
    try:
        start = 128
        while start < len(raw):
            kind, size = struct.unpack_from("<2I", raw, start)
            part = raw[start + 8:start + 8 + size]
            text += zlib.decompress(part) if kind == 15 else part
            start += 8 + size
    except (struct.error, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    ids = list(dict.fromkeys(found.decode() for found in re.findall(rb"n\d{8}", text.replace(b"\0", b""))))[:1000]
    if sorted(ids) != sorted(expected) or ids[:2] != ["n02119789", "n02100735"]:
        raise ValueError(f"{path} does not list ImageNet's 1,000 classes, kit fox first, then English setter")
    return ids


def _sorted_folders(home, split, facts):
    """Class folders."""
    parts = ("classes/test", "test", "val", "validation", ".") if split == "test" else ("classes/train", "train")
    place = next((home / part for part in parts if (home / part).is_dir() and any(
        picture_files(entry) for entry in (home / part).iterdir() if entry.is_dir())), None)
    if place is None:
        return None
    paths, labels, own = class_folder(place)
    labels = [[label] for label in labels]
    if facts.get("metric") == "11point_mAP":  # a picture of several classes lies in several folders
        shown = {}
        for path, label in zip(paths, labels, strict=True):
            shown.setdefault(path.name, (path, []))[1].extend(label)
        paths, labels = map(list, zip(*shown.values(), strict=True))
    return place, paths, labels, own, True


@lru_cache(64)
def _zip(path, process):
    """An open zip, of this process alone: forked ones would share its place in the file."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip, or is cut off ({error})") from error


def picture_name(picture):
    """How messages call a picture of a TestSet."""
    if isinstance(picture, np.ndarray):
        return "a picture of the batch"
    return "@".join(map(str, picture)) if isinstance(picture, tuple) else str(picture)


def load_picture(picture):
    """A picture of a TestSet -> RGB picture.  Raises ValueError that names it where it cannot be read."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("RGB")
    try:
        content = (_zip(str(picture[0]), os.getpid()).read(picture[1]) if isinstance(picture, tuple)
                   else Path(picture).read_bytes())
        return decode(content)
    except (*BAD_IMAGE, zipfile.BadZipFile, KeyError, RuntimeError) as error:  # RuntimeError: encrypted, odd packing
        raise ValueError(f"cannot read the picture {picture_name(picture)}: {error}") from error


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
    return sorted(path for path in Path(folder).iterdir()
                  if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._"))  # ._: macOS adds them


def karpathy(folder):
    """The test pairs of a folder with a Karpathy json.  -> paths of pictures, sentences, picture of each sentence

    The json is karpathy.json or dataset.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, with
    "filepath" (COCO) a folder under images/.  Raises FileNotFoundError without one, ValueError for another format.
    """
    folder = Path(folder)
    files = [folder / "karpathy.json", folder / "dataset.json", *sorted(folder.glob("dataset_*.json"))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no karpathy.json, dataset.json or dataset_*.json in {folder.resolve()}: a retrieval "
                                "set is a folder with that file (Karpathy's format) and its pictures in images/")
    homes = [folder / part for part in ("images", "flickr30k-images", "flickr30k_images", ".")]
    paths, texts, owners = [], [], []
    try:
        for image in load_json(file.read_bytes())["images"]:
            if image["split"] == "test":
                owners += [len(paths)] * len(image["sentences"])
                texts += [sentence["raw"] + "" for sentence in image["sentences"]]  # TypeError for what is no text
                name = Path(image.get("filepath", ""), image["filename"])
                paths.append(next((home / name for home in homes if (home / name).is_file()), homes[0] / name))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a Karpathy json ({type(error).__name__}: {error})") from error
    if not texts:
        raise ValueError(f"{file} has no picture of split 'test' with a sentence")
    return paths, texts, owners


@dataclass
class SegmentationSet:
    """Pictures whose every pixel has a label."""
    name: str
    place: Path
    pictures: list      # paths
    labels: list        # paths of PNGs of the same sizes: class k is k + 1, nothing is 0 (or 255)
    names: list         # of the classes
    remarks: tuple = ()

    def load(self, i):
        """-> RGB picture, `label`.  Raises ValueError that names a file."""
        return load_picture(self.pictures[i]), self.label(i)

    def label(self, i):
        """-> picture (L) of classes 0 .. C - 1, 255 for none.  Raises ValueError that names a file."""
        file = self.labels[i]
        try:
            width, height = upright_size(Image.open(self.pictures[i], formats=FORMATS))  # no pixel is decoded
            label = Image.open(file, formats=("PNG",))
            values = np.array(label)
        except BAD_IMAGE as error:
            raise ValueError(f"cannot read the label picture {file}: {error}") from error
        if label.mode not in ("L", "P", "1", "I", "I;16") or label.size != (width, height):
            raise ValueError(f"{file} is a picture of {label.width} x {label.height}, mode {label.mode}, of labels for "
                             f"{width} x {height}: it must be as large, and one number a pixel (L or P)")
        odd = (values > len(self.names)) & (values != 255)
        if odd.any():
            raise ValueError(f"{file} holds {values[odd].max()}: there are {len(self.names)} classes, from 1; 0 and "
                             "255 are left out")
        return Image.fromarray(np.where(values == 255, 255, values.astype(np.int32) - 1).astype(np.uint8))


def segmentation_set(name, root="", split=""):
    """The labelled pictures NAME (under root) or of the path NAME, of a split: "train" or "test".

    Layouts: ADE20K's images/{training,validation}/ and annotations/; {train,val or test}/{images,labels}/; or
    {images,labels}/ alone, of which every fifth picture is the test split, and which "" takes whole.  classes.txt (or
    ADE20K's objectInfo150.txt) names the classes.  Raises FileNotFoundError or ValueError.
    """
    if name == "demo":
        draw_demo(Path(root) / "demo")
    homes = [Path(root, name), Path(name)] + [Path(root, "ADEChallengeData2016")] * (name == "ade20k")
    places = [place for home in homes for place in (home, home / "dense")]
    ade, own = ("training", ["train"]) if split == "train" else ("validation", ["val", "test"])
    parts = [(f"images/{ade}", f"annotations/{ade}"), *((f"{part}/images", f"{part}/labels") for part in own),
             ("images", "labels")]
    place, images, labels = next(((place, *pair) for place in places for pair in parts
                                  if all((place / part).is_dir() for part in pair)), (None, "", ""))
    if place is None:
        raise FileNotFoundError(f"no segmentation set '{name}': looked in {', '.join(map(str, places))} for images/ "
                                "and labels/ (PNG), the same in train/ and val/, or ADE20K's images/ and "
                                "annotations/ (--root or $MASKCLIP_DATA name another place"
                                + "; ADEChallengeData2016.zip is at sceneparsing.csail.mit.edu" * (name == "ade20k")
                                + ")")
    file = next((place / one for one in ("classes.txt", "objectInfo150.txt") if (place / one).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no classes.txt (or ADE20K's objectInfo150.txt) in {place.resolve()}: a line for each "
                                "class")
    lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    if file.name == "objectInfo150.txt":  # Idx, Ratio, Train, Val, Stuff, Name
        lines = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
    if len(lines) > 254:
        raise ValueError(f"{file} names {len(lines)} classes: at most 254, as 255 stands for none")
    pictures, remarks = picture_files(place / images), ()
    if split and images == "images":
        pictures = [path for i, path in enumerate(pictures) if (i % 5 == 0) == (split == "test")]
        remarks = (f"{place} has no splits: every fifth picture is a test picture",)
    if not pictures:
        raise FileNotFoundError(f"no pictures in {place / images}")
    files = [place / labels / f"{path.stem}.png" for path in pictures]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(files)} label pictures are missing, the first is {missing[0]}")
    return SegmentationSet(str(name), place, pictures, files, lines, remarks)


def templates_of(folder):
    """The lines of the set's own templates.txt, or TEMPLATES."""
    file = Path(folder) / "templates.txt"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line.strip()] or TEMPLATES


# ---------------------------------------------------------------- commands

def pack(pairs, out, size=0, shard_size=10_000):
    """Write all pairs as shards OUT/00000.tar ...; those that are there are kept.  -> list of what was left out

    size: pictures with a longer short side are resized to it (bicubic, JPEG of quality 95 as img2dataset); others, and
    all with 0, keep their bytes.  Raises ValueError where OUT was packed from other files or in another way.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamp, stamp_file = dict(pairs=pairs.digest(), size=size, shard_size=shard_size), out / "pack.json"
    if not stamp_file.is_file() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not packed by this program: give another --out")
    if stamp_file.is_file():
        there = stamp_file.read_text("utf-8", "replace")
        if there not in (json.dumps(dict(stamp, done=done)) for done in (False, True)):
            raise ValueError(f"{out} was packed from other files or in another way ({there} there, "
                             f"{json.dumps(stamp)} now): give another --out")
    for part in out.glob("*.partial-*"):  # of a run that was killed
        part.unlink()
    numbers = [i for i in range(math.ceil(len(pairs) / shard_size)) if not (out / f"{i:05d}.tar").is_file()]
    write_atomically(stamp_file, json.dumps(dict(stamp, done=False)).encode())
    bad = in_parallel(partial(_pack_shard, pairs, out, size, shard_size), numbers, f"packing into {out}")
    write_atomically(stamp_file, json.dumps(dict(stamp, done=True)).encode())
    return sum(bad, [])


def _pack_shard(pairs, out, size, shard_size, number):
    bad = []
    with making(out / f"{number:05d}.tar") as file, tarfile.open(fileobj=file, mode="w",
                                                                 format=tarfile.USTAR_FORMAT) as tar:
        for i in range(number * shard_size, min(len(pairs), (number + 1) * shard_size)):
            try:
                content, captions = pairs[0, i]
                image = open_picture(content)
                suffix = dict(JPEG="jpg", MPO="jpg", PNG="png", WEBP="webp").get(image.format)
                if suffix is None or 0 < size < min(image.size):
                    shrink, suffix = (min(image.size) / size if size else 1.0), "jpg"
                    image = decode(image, shrink / 2)  # of twice the size at least, for bicubic's sake
                    shrink = max(1.0, min(image.size) / size if size else 1.0)
                    image = image.resize([max(1, round(side / shrink)) for side in image.size], Image.BICUBIC)
                    content = _encoded(image, "JPEG", quality=95)
            except BAD_IMAGE as error:
                bad.append(f"{pairs.name(0, i)}: {error}")
                continue
            key = f"{number:05d}{i - number * shard_size:05d}"
            add_member(tar, f"{key}.{suffix}", content)
            if len(captions) == 1:
                add_member(tar, f"{key}.txt", captions[0].encode("utf-8", "replace"))
            else:
                add_member(tar, f"{key}.json", json.dumps(dict(captions=captions)).encode())
    return bad


def check(pairs):
    """Decode every pair once; write what cannot be used into skip lists beside the data.  -> list of (file, reason)

    Other pairs then take the places of those on a list, uncounted, until the list is deleted or the file changes.
    Raises ValueError where a source holds nothing else.
    """
    found = []
    for source in {(source.path, source.first.tobytes()): source for source in pairs.sources}.values():
        bad = sum(in_parallel(partial(_check_part, source), range(len(source.count)), f"checking {source}"), [])
        if len(bad) == len(source):
            raise ValueError(f"all of the {len(bad):,} pairs of {source} are bad, the first for this reason: "
                             f"{bad[0][2]}; no skip list is written")
        (names, stamps), old = zip(*source.stamps().items()), made(source.path, ".skip")
        mine = set(np.array(names, object)[source.mine])  # of other shards of the folder the list keeps what it says
        lines = old.read_text("utf-8").splitlines() if old else []
        lines = [line for line in lines if json.loads(line)[0] not in mine]
        lines += [json.dumps([names[number], *stamps[number], offset, reason]) for number, offset, reason in bad]
        if lines or old:
            write_atomically(to_make(source.path, ".skip"), "".join(f"{line}\n" for line in lines).encode())
        found += [(source.file_name(number), reason) for number, _, reason in bad]
    return found


def _check_part(source, part):
    bad = []
    for row in range(source.first[part], source.first[part] + source.count[part]):
        try:
            decode(source.read(row)[0])
        except BAD_IMAGE as error:
            bad.append((*source.place(row), " ".join(str(error).split())))
    return bad


def show(pairs, out, count=24, size=224, crop_min=0.5, seed=0):
    """A contact sheet of random pairs, cropped as in training (SLIP's crop), each over a caption drawn for it."""
    columns, line = 6, 14
    sheet = Image.new("RGB", (columns * (size + 8), math.ceil(count / columns) * (size + 5 * line)), "white")
    pen, rng = ImageDraw.Draw(sheet), np.random.default_rng(seed)
    for k in range(count):
        x, y = k % columns * (size + 8) + 4, k // columns * (size + 5 * line) + 4
        try:
            content, captions = pairs[0, int(rng.integers(len(pairs)))]
            image = decode(content)
            caption = captions[int(rng.integers(len(captions)))]
            sheet.paste(crop(image, crop_box(*image.size, (crop_min, 1.0), rng), size), (x, y))
        except BAD_IMAGE as error:
            caption = f"bad pair: {error}"
        lines = textwrap.wrap(caption, size // 6, max_lines=4, placeholder=" ...")
        pen.multiline_text((x, y + size + 2), "\n".join(lines), fill="black", spacing=2)
    with making(out) as file:
        sheet.save(file, "PNG")


def stats(pairs, limit=10_000):
    """Numbers of pairs, and of `limit` of them, spread evenly, the lengths and sizes.  -> text"""
    n, step = len(pairs), max(1, math.ceil(len(pairs) / limit))
    parts = in_parallel(partial(_measure, pairs, Tokenizer.clip()), [range(i, min(n, i + 100 * step), step)
                                                                     for i in range(0, n, 100 * step)], "measuring")
    found = np.array([row for rows, _ in parts for row in rows])
    if not len(found):
        raise ValueError("none of the pairs can be read: python data.py check says why")
    lines = [f"{len(source):,} pairs in {len(source.count):,} parts: {source}" for source in pairs.sources]
    lines += [f"{n:,} pairs an epoch; of {len(found) + sum(bad for _, bad in parts):,}, spread evenly:",
              f"{'':<31}" + "".join(f"{name:>10}" for name in ("least", "5 %", "median", "95 %", "most"))]
    for name, values in zip(("captions", "tokens of the first, with ends", "width", "height", "bytes"), found.T):
        lines.append(f"{name:<31}" + "".join(f"{v:>10,.0f}" for v in np.percentile(values, (0, 5, 50, 95, 100))))
    lines.append(f"{(found[:, 1] > 77).mean():.1%} of the first captions are longer than 77 tokens; "
                 f"{sum(bad for _, bad in parts)} pairs are bad")
    return "\n".join(lines)


def _measure(pairs, tokenizer, indices):
    rows, bad = [], 0
    for i in indices:
        try:
            content, captions = pairs[0, i]
            rows.append((len(captions), 2 + len(tokenizer.encode(captions[0])), *upright_size(open_picture(content)),
                         len(content)))
        except BAD_IMAGE:
            bad += 1
    return rows, bad


def clean_yfcc(text):
    """A title or description of YFCC100M's table as SLIP cleaned it: unquoted, without links, bold and italics, URLs.

    White space is made single besides, as the tokenizer does anyway.
    """
    text = unquote(text).replace("+", " ")
    text = re.sub(r"<a.*?>|</a>|<b>|</b>|<i>|</i>", "", text)
    return " ".join(re.sub(r"http\S+|www\S+", "", text).split())


def yfcc(subset, dataset, out, hashed=False):
    """OpenAI's list of YFCC-15M and YFCC100M's table -> a table of image, url, title, description.  -> rows, left out

    subset: lines of (line number, photo identifier, hash).  dataset: 25 columns of which the first three are the same,
    the ninth and tenth title and description, the 17th the URL.  Either may be .bz2.  image: SLIP's place in zips, or
    with `hashed` that of the public bucket, HAS/HHA/HASH.jpg.  Rows without any caption are left out.
    """
    def lines(path):
        """(number in the first cell, line) of each line."""
        with tqdm(total=os.path.getsize(path), desc=f"reading {path}", unit="B", unit_scale=True, disable=None) as bar:
            with open(path, "rb") as raw, bz2.open(raw) if Path(path).suffix == ".bz2" else raw as file:
                try:
                    for i, line in enumerate(file, 1):
                        line, number = line.decode("utf-8", "replace").rstrip("\r\n"), line.split(b"\t", 1)[0]
                        bar.update(raw.tell() - bar.n)
                        if not number.isdigit() or int(number) >= len(wanted):
                            raise ValueError(f"{path}, line {i}: wanted is a line's number in YFCC100M's table, a tab "
                                             f"and other cells, not '{line[:80]}'")
                        yield int(number), line
                except EOFError as error:
                    raise ValueError(f"{path} is cut off: fetch it anew") from error

    if out.exists():
        raise ValueError(f"{out} exists: delete it, or give another --out")
    wanted, rows, left_out = np.zeros(2 ** 27, bool), 0, 0  # YFCC100M has 100 million lines
    for number, _ in lines(subset):
        wanted[number] = True
    with making(out) as file:
        file.write(b"image\turl\ttitle\tdescription\n")
        for number, line in lines(dataset):
            if wanted[number]:
                cells = line.split("\t")
                if len(cells) != 25:
                    raise ValueError(f"{dataset}: line {number} has {len(cells)} columns, not 25")
                title, description, name = clean_yfcc(cells[8]), clean_yfcc(cells[9]), cells[2]
                if not title and not description:
                    left_out += 1
                    continue
                image = f"{name[:3]}/{name[3:6]}/{name}.jpg" if hashed else yfcc_zip(number)
                file.write(f"{image}\t{cells[16]}\t{title}\t{description}\n".encode("utf-8", "replace"))
                rows += 1
    return rows, left_out


def main(argv=None):
    """The command line."""
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is less than 1")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in dict(stats="pairs, caption lengths in tokens, picture sizes",
                           show="a contact sheet of random pairs",
                           check="decode everything once, list what is bad, and skip it from then on",
                           pack="write shards; goes on where it was stopped").items():
        command = commands.add_parser(name, help=help)
        command.add_argument("data", nargs="+", help="as train.py's --data")
        command.add_argument("--root", default=os.environ.get("MASKCLIP_DATA", "data"))
        if name in ("show", "pack"):
            command.add_argument("--out", required=True, help="the PNG file" if name == "show" else "folder of shards")
        if name == "pack":
            command.add_argument("--size", type=positive, default=0, help="resize longer short sides to so many pixels")
            command.add_argument("--shard-size", type=positive, default=10_000, help="pairs a shard")
        if name == "show":
            command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("yfcc", help="captions of YFCC-15M, cleaned as SLIP's")
    command.add_argument("subset", help="OpenAI's yfcc100m_subset_data.tsv")
    command.add_argument("dataset", help="YFCC100M's yfcc100m_dataset.txt")
    command.add_argument("--out", required=True, help="the table, say yfcc15m.tsv")
    command.add_argument("--hashed", action="store_true", help="pictures lie as in the public bucket, by hash")
    args = parser.parse_args(argv)
    try:
        if args.command == "show" and Path(args.out).suffix != ".png":
            raise ValueError(f"--out {args.out} must be a file NAME.png")
        if args.command == "yfcc":
            rows, left_out = yfcc(args.subset, args.dataset, Path(args.out), args.hashed)
            print(f"{args.out}: {rows:,} pictures with captions; {left_out:,} had none once cleaned")
            return
        pairs = Pairs(args.data, args.root)
        for line in pairs.damage:
            print(f"warning: {line}")
        if args.command == "stats":
            print(stats(pairs))
        elif args.command == "show":
            show(pairs, Path(args.out), seed=args.seed)
            print(args.out)
        elif args.command == "check":
            bad = check(pairs)
            for (file, reason), count in Counter(bad).most_common(100):
                print(f"{count:>7} in {file}: {reason}")
            lists = sorted({str(place) for source in pairs.sources if (place := made(source.path, ".skip"))})
            print(f"{len(bad):,} of {sum(map(len, pairs.sources)):,} pairs are bad" + bool(bad) * (
                f"; others take their places from now on, until {', '.join(lists)} is deleted"))
        else:
            bad = pack(pairs, Path(args.out), args.size, args.shard_size)
            print("".join(f"left out: {line}\n" for line in bad[:10]) + f"{args.out}: packed; {len(bad):,} pairs bad")
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: error: {str(error).splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; the same command goes on" if args.command == "pack" else "data.py: interrupted")


if __name__ == "__main__":
    main()
