"""The demo world: drawn scenes of coloured shapes with true sentences, all from a seed.

It stands in where there is no data: training pairs, a retrieval set, a classification set and a
segmentation set, in the layouts that the programs read.  Some combinations of colour and shape are
never in a training picture.  All numbers of this file are our choice.

    draw_demo("data/demo")          half a minute on two cores; a second call returns at once
"""
import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from support.shards import add_member, in_parallel

DEMO_VERSION = 1  # raise it if the pictures change: folders of another version are drawn again
COLOURS = dict(red=(214, 40, 40), yellow=(250, 215, 50), green=(40, 155, 70),
               blue=(40, 90, 215), black=(25, 25, 28), white=(250, 250, 250))
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
SIZES = dict(small=(8.0, 10.0), large=(13.5, 16.5))  # radius in pixels of a 64-pixel picture
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
HELD_OUT = ("red star", "blue ring", "green triangle", "white square")  # never in training
GROUNDS = ("plain", "shaded", "striped", "spotted", "grainy")
TEMPLATES = "a {}\na picture of a {}\nthere is a {}\nthere is a {} in the picture\n"

# Each shape has a texture, in two tones of its colour, as real things have: a small ViT learns
# textures in minutes, plain outlines in hours (we measured both).
# (u, v): pixels from the middle, along the object's axes -> where the other tone is.
TEXTURES = dict(
    circle=lambda u, v: np.zeros_like(u, bool),
    square=lambda u, v: (u // 4 + v // 4) % 2 == 1,
    triangle=lambda u, v: v % 5 < 2.5,
    star=lambda u, v: u % 5 < 2.5,
    cross=lambda u, v: (u % 5 - 2.5) ** 2 + (v % 5 - 2.5) ** 2 < 2.5,
    ring=lambda u, v: np.arctan2(v, u) * 4 / np.pi % 2 < 1,
    diamond=lambda u, v: v > 0,
)


# ------------------------------------------------ a scene

def _outline(shape):
    """The corners (n, 2) of a shape inside the unit circle, y down."""
    if shape == "cross":
        a, b = 0.95, 0.32
        return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                         (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
    n = dict(circle=40, ring=40, star=10, square=4, diamond=4, triangle=3)[shape]
    radius = np.full((n, 1), 1.0 if shape in ("circle", "ring", "star") else 1.1)
    if shape == "star":
        radius[1::2] = 0.42
    angle = 2 * np.pi * np.arange(n) / n - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius


def _ground(kind, size, rng):
    """A background picture in two muted tones, so that no colour word is true of it."""
    base = rng.uniform(110, 195) + rng.uniform(-14, 14, 3)
    other = base + rng.choice([-1, 1]) * rng.uniform(14, 30)
    angle = rng.uniform(0, np.pi)
    step = rng.uniform(5, 9)
    y, x = np.mgrid[:size, :size] / size
    along = x * np.cos(angle) + y * np.sin(angle)
    blend = np.zeros_like(x)  # plain
    if kind == "shaded":
        blend = (along - along.min()) / np.ptp(along)
    elif kind == "striped":
        blend = (along * step) % 1 < 0.5
    elif kind == "spotted":
        blend = ((x * step) % 1 - 0.5) ** 2 + ((y * step) % 1 - 0.5) ** 2 < 0.08
    elif kind == "grainy":
        blend = rng.random((size, size))
    pixels = base + (other - base) * blend[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _arrange(rng, count, classes):
    """`count` objects that do not touch, in a 64-pixel square.  -> list of dicts"""
    objects = []
    while len(objects) < count:
        objects = []
        for name in rng.choice(classes, count, replace=False).tolist():
            size = str(rng.choice(list(SIZES)))
            radius = rng.uniform(*SIZES[size])
            for _ in range(20):  # until it touches no other; else the scene is arranged again
                x, y = rng.uniform(radius + 1, 63 - radius, 2)
                if all(math.hypot(x - o["x"], y - o["y"]) > radius + o["radius"] + 2
                       for o in objects):
                    turn = rng.uniform(-0.25, 0.25)
                    axes = np.array([[math.cos(turn), math.sin(turn)],
                                     [-math.sin(turn), math.cos(turn)]])
                    objects.append(dict(name=name, size=size, x=x, y=y, radius=radius, axes=axes))
                    break
    return objects


def _draw_object(o, rng, picture, labels):
    """Draw an object in its texture on a picture (RGB, 128 x 128), and on its labels (64 x 64)."""
    colour, shape = o["name"].split()
    tone = (np.array(COLOURS[colour]) + rng.uniform(-18, 18, 3)).clip(0, 255)
    other = tone * 0.4 + (150 if tone.sum() < 330 else 0)  # lighter if it is dark, else darker
    reach = 1.2 * o["radius"]
    sides = (o["x"] - reach, o["y"] - reach, o["x"] + reach, o["y"] + reach)
    x0, y0, x1, y1 = (int(2 * side) for side in sides)
    y, x = np.mgrid[y0:y1, x0:x1] / 2
    u, v = np.tensordot(o["axes"], [x - o["x"], y - o["y"]], 1)
    pixels = np.where(TEXTURES[shape](u, v)[..., None], other, tone)
    stencil = Image.new("L", picture.size)
    for canvas, k, fill in ((stencil, 2, 255), (labels, 1, 1 + CLASSES.index(o["name"]))):
        pen = ImageDraw.Draw(canvas)
        centre = k * np.array([o["x"], o["y"]])
        radius = k * o["radius"]
        corners = centre + radius * (_outline(shape) @ o["axes"])
        pen.polygon(corners.flatten().tolist(), fill=fill)
        if shape == "ring":
            pen.circle(tuple(centre), radius * 0.55, fill=0)
    texture = Image.fromarray(pixels.astype(np.uint8))
    picture.paste(texture, (x0, y0), stencil.crop((x0, y0, x1, y1)))


def draw_scene(rng, count, classes):
    """Draw `count` objects of the given classes on a ground.

    -> picture (RGB, 64 x 64), labels (L, 0 = ground, else 1 + number in CLASSES),
       objects (dicts), the ground's name
    """
    objects = _arrange(rng, count, classes)
    ground = str(rng.choice(GROUNDS))
    picture = _ground(ground, 128, rng)  # twice the size, then halved: smooth edges
    labels = Image.new("L", (64, 64))
    for o in objects:
        _draw_object(o, rng, picture, labels)
    return picture.resize((64, 64), Image.BOX), labels, objects, ground


# ------------------------------------------------ a sentence

def _noun(o, rng, full):
    colour, shape = o["name"].split()
    size = f"{o['size']} " if full or rng.random() < 0.5 else ""
    colour = f"{colour} " if full or rng.random() < 0.6 else ""
    return f"a {size}{colour}{shape}"


def describe(objects, ground, rng, full=False):
    """A true sentence about a scene.

    What it leaves out is drawn too: if no colour is said, the shape has to be learned.
    full: size, colour and shape of every object are said, as a test of retrieval needs.
    """
    order = [objects[i] for i in rng.permutation(len(objects))]  # one to three
    noun, *others = [_noun(o, rng, full) for o in order]
    if not others:
        side = ["left", "middle", "right"][int(order[0]["x"] // 21.4)]
        end = [f" on the {side}", " in the picture", ""][rng.integers(3)]
        text = [f"{noun}{end}", f"a picture of {noun}", f"there is {noun}{end}",
                f"one {noun[2:]}"][rng.integers(4)]
    else:
        dx = order[1]["x"] - order[0]["x"]
        dy = order[1]["y"] - order[0]["y"]
        relation = "below" if dy < 0 else "above"
        if abs(dx) > abs(dy):
            relation = "right of" if dx < 0 else "left of"
        if rng.random() < 0.6:
            text = ", and ".join([f"{noun} {relation} {others[0]}", *others[1:]])
        else:
            text = ", ".join([noun, *others[:-1]]) + f" and {others[-1]}"
        text = ["", "a picture of ", "there is "][rng.integers(3)] + text
    if rng.random() < 0.15:
        text += f" on a {ground} ground"
    return text


# ------------------------------------------------ the sets
# The second number of a seed is the set's: 0 is training, so no test picture is a training picture.

def draw_shard(folder, seed, size, number):
    """Write a training shard FOLDER/NUMBER.tar: `size` scenes of one to three objects."""
    classes = [name for name in CLASSES if name not in HELD_OUT]
    path = Path(folder, f"{number:05d}.tar")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(size):
            rng = np.random.default_rng([seed, 0, number, i])
            count = int(rng.choice([1, 1, 2, 2, 3]))
            picture, _, objects, ground = draw_scene(rng, count, classes)
            content = io.BytesIO()
            picture.save(content, "PNG", compress_level=1)
            add_member(tar, f"{number:05d}{i:04d}.png", content.getvalue())
            add_member(tar, f"{number:05d}{i:04d}.txt", describe(objects, ground, rng).encode())


def _draw_retrieval(folder, seed):
    images = []
    for i in range(500):
        rng = np.random.default_rng([seed, 1, i])
        picture, _, objects, ground = draw_scene(rng, int(rng.integers(2, 4)), CLASSES)
        picture.save(folder / f"images/{i:05d}.png")
        ids = [2 * i, 2 * i + 1]
        sentences = [dict(raw=describe(objects, ground, rng, full=True), imgid=i, sentid=number)
                     for number in ids]
        images.append(dict(filename=f"{i:05d}.png", imgid=i, split="test", sentences=sentences,
                           sentids=ids))
    (folder / "karpathy.json").write_text(json.dumps(dict(images=images, dataset="demo")), "utf-8")


def _draw_classes(folder, seed):
    for part, (split, each) in enumerate([("train", 20), ("test", 12)]):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                rng = np.random.default_rng([seed, 2, part, number, i])
                draw_scene(rng, 1, [name])[0].save(folder / split / name / f"{i:03d}.png")
        (folder / split / "templates.txt").write_text(TEMPLATES, "utf-8")


def _draw_segmentation(folder, seed):
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
    (folder / "templates.txt").write_text(TEMPLATES, "utf-8")
    for i in range(200):
        rng = np.random.default_rng([seed, 3, i])
        picture, labels, _, _ = draw_scene(rng, int(rng.integers(2, 4)), CLASSES)
        picture.save(folder / f"images/{i:05d}.png")
        labels.save(folder / f"labels/{i:05d}.png")


def _draw(task):
    function, *arguments = task
    function(*arguments)


def draw_demo(folder, shards=20, shard_size=1000, seed=0):
    """Draw the demo world into a folder that is missing or empty, once.  -> folder

    train/00000.tar ...             pairs without the HELD_OUT combinations
    val/karpathy.json, val/images/  retrieval: 500 scenes of two or three objects, 1,000 sentences
    classes/{train,test}/CLASS/     single objects: 42 classes, 20 and 12 pictures each
    dense/{images,labels}/          200 scenes with label pictures: 0 = ground, k = line k of
    dense/classes.txt               the names of the classes

    Raises FileExistsError if something else is there.
    """
    folder = Path(folder)
    marker = folder / "demo.json"
    settings = json.dumps(dict(demo=DEMO_VERSION, shards=shards, shard_size=shard_size, seed=seed))
    if marker.is_file():
        if marker.read_bytes() == settings.encode():
            return folder
        shutil.rmtree(folder)  # of another version or size
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and was not drawn by this program: move it away, "
                              "or use another --root")
    # Drawn under another name, so that a process that is killed leaves nothing like a demo.
    part = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        for name in ("train", "val/images", "dense/images", "dense/labels"):
            (part / name).mkdir(parents=True)
        tasks = [(_draw_classes, part / "classes", seed), (_draw_retrieval, part / "val", seed),
                 (_draw_segmentation, part / "dense", seed)]
        tasks += [(draw_shard, part / "train", seed, shard_size, i) for i in range(shards)]
        drawn = in_parallel(_draw, tasks)
        list(tqdm(drawn, "drawing the demo world", len(tasks), disable=None, leave=False))
        (part / "demo.json").write_text(settings, "utf-8")
        if not marker.is_file():  # else another process was faster
            part.rename(folder)   # also onto an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
