"""Every source that prepare.py packs, as a generator of records whose pictures are read later.

A record is (name for messages, load): load() -> bytes of the picture's file, list of captions.  It
raises one of BAD_IMAGE if either is missing.  The main process runs the generator once; other
processes call load.  A new format needs a generator of rows (dicts) and its suffix in ROWS.
Ideas: SLIP (YFCC100M in zips, yfcc15m.pkl, cc3m.npy), CLIP (templates for the names of classes).
"""
import csv
import hashlib
import json
import os
import pickle
import re
import zipfile
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

import data
from support import shards, testsets

IMAGE_FIELDS = ("image", "filepath", "file_name", "filename", "path")


def open_sources(names, root, classes=False):
    """A table; or a folder of class folders; or shards and names as train.py's --data takes them.

    -> records, fingerprint (equal only if the records are), warnings
    Raises FileNotFoundError or ValueError.
    """
    if classes and len(names) > 1:
        raise ValueError("--classes takes one folder of class folders at a time")
    path = Path(root, names[0]) if Path(root, names[0]).exists() else Path(names[0])
    if classes:
        return _open_classes(path)
    if len(names) == 1 and path.suffix.lower() in ROWS:
        return _open_table(path)
    try:
        pairs = data.Pairs(names, root)
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: give one table ({', '.join(ROWS)}), or one folder "
                         "of class folders with --classes, or shards (*.tar)") from error
    records = ((pairs.name(i), partial(pairs.__getitem__, i)) for i in range(len(pairs)))
    return records, pairs.fingerprint, pairs.warnings


def _open_classes(folder):
    """The pictures of class folders, in an order that mixes the classes of each shard.

    A class has a caption for each of its names in words.txt and each line of templates.txt.
    """
    paths, labels, names = testsets.class_folder(folder)
    words = {}  # a line of words.txt is KEY, tab, "name, synonym"
    if (folder / "words.txt").is_file():
        lines = (folder / "words.txt").read_text("utf-8", "replace").splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    templates = testsets.templates_of(folder)
    captions = []  # of each class
    for name in names:
        synonyms = words.get(name, name.replace("_", " ")).split(", ")
        captions.append([template.replace("{}", synonym)
                         for synonym in synonyms for template in templates])
    images = [f"{names[label]}/{path.name}" for path, label in zip(paths, labels)]
    order = np.random.default_rng(0).permutation(len(paths))
    rows = (dict(image=images[i], captions=captions[labels[i]]) for i in order)
    fingerprint = hashlib.sha1(repr((images, captions)).encode()).hexdigest()[:16]
    return _records(folder, folder, rows), fingerprint, []


def _open_table(path):
    """A table with a picture's path among IMAGE_FIELDS, and TEXT_FIELDS.

    Paths are relative to the table's folder, to images/ or the split's folder in it, or to the same
    one level up.  PATH.zip/MEMBER is in a zip.
    """
    path = Path(os.path.abspath(path))
    rows = _rows(path)
    first = list(islice(rows, 100))
    split = path.stem.split("_")[-1]  # COCO: captions_train2017.json and train2017/
    homes = [folder / part for folder in (path.parent, path.parent.parent)
             for part in ("", "images", split)]
    files = [re.sub(r"\.zip/.*", ".zip", _image_of(row)) for row in first]
    homes = [home for home in homes if any(os.path.isfile(home / file) for file in files)]
    if not homes:
        raise FileNotFoundError(f"{path}: none of the first pictures that its records name in "
                                f"{', '.join(IMAGE_FIELDS)} exists ({', '.join(files[:2])})")
    fingerprint = hashlib.sha1(np.memmap(path, mode="r")).hexdigest()[:16]
    return _records(path, homes[0], chain(first, rows)), fingerprint, []


# ---------------------------------------------------------------- a record

def _records(source, home, rows):
    """The record of each row.  home: of the pictures."""
    for number, row in enumerate(rows, 1):
        yield f"{source}, record {number}", partial(_load, row, home)


def _load(row, home):
    """-> bytes of a row's picture, its captions"""
    image = _image_of(row)
    if not image:
        raise FileNotFoundError(f"it names no picture ({', '.join(IMAGE_FIELDS)})")
    captions = shards.captions_of(row)
    archive, inside, member = image.partition(".zip/")
    if not inside:
        return Path(home, image).read_bytes(), captions
    try:
        return _open_zip(Path(home, f"{archive}.zip")).read(member), captions
    except (KeyError, zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: encrypted
        raise OSError(f"cannot read {image}: {error}") from error


def _image_of(row):
    """The path of a row's picture, or "" if the row names none."""
    images = [row[field] for field in IMAGE_FIELDS if row.get(field)]
    return images[0] if images and isinstance(images[0], str) else ""


# 64 is our choice: opening reads a zip's directory, and neighbours share a zip.
_open_zip = lru_cache(64)(zipfile.ZipFile)


# ---------------------------------------------------------------- pickles that run no code

class _Array:
    """Stands for numpy's array, and its dtype.  The state of an array ends with its items."""

    def __init__(self, *_):
        """The items follow."""

    def __setstate__(self, state):
        self.items = state[-1]


class _PlainUnpickler(pickle.Unpickler):
    """Lists, tuples, dicts, strings, numbers, and numpy's arrays of such; it knows no function."""

    def find_class(self, module, name):
        if name not in ("_reconstruct", "ndarray", "dtype"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no plain value")
        return _Array


# ---------------------------------------------------------------- rows: a function per format

def _csv_rows(path):
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        yield from csv.DictReader(file)


def _tsv_rows(path):
    """A quote and a lone carriage return are characters as any other: no CSV with tabs."""
    with open(path, newline="\n", encoding="utf-8-sig", errors="replace") as file:
        lines = (line.rstrip("\r\n").split("\t") for line in file)
        columns = next(lines, [])
        yield from (dict(zip(columns, cells)) for cells in lines if any(cells))


def _jsonl_rows(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else {}  # {} is counted: it names no picture


def _coco_rows(path):
    content = json.loads(path.read_bytes())
    captions = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for image in content["images"]:
        if image["id"] in captions:
            yield dict(image=image["file_name"], captions=captions[image["id"]])


def _slip_rows(path):
    """yfcc15m.pkl: (line of YFCC100M's table, title, description); cc3m.npy, cc12m.npy: dicts."""
    with open(path, "rb") as file:
        if path.suffix.lower() == ".npy":
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        content = _PlainUnpickler(file, encoding="latin1").load()  # SLIP's are of Python 2
    for record in content.items if isinstance(content, _Array) else content:
        if isinstance(record, dict):  # of cc12m.npy image_name is the path, image_id a number
            image = str(record.get("image_name", record.get("image_id")))
            yield dict(image=image, captions=list(record["captions"]))
        else:
            number, *captions = record
            yield dict(image=yfcc_zip(number), captions=captions)


ROWS = {".csv": _csv_rows, ".tsv": _tsv_rows, ".jsonl": _jsonl_rows,
        ".json": _coco_rows, ".pkl": _slip_rows, ".npy": _slip_rows}


def _rows(path):
    """The rows of a table.  Raises ValueError if the file is not what its suffix says."""
    try:
        yield from ROWS[path.suffix.lower()](path)
    except (KeyError, TypeError, ValueError, EOFError, csv.Error, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {path}: {error!r}") from error


def yfcc_zip(number):
    """SLIP's path of a picture of YFCC100M: 12345678 is images/12/345.zip/678.jpg."""
    digits = f"{int(number):08d}"
    return f"images/{digits[:-6]}/{digits[-6:-3]}.zip/{digits[-3:]}.jpg"
