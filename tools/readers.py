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
import zipfile
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

import data
from support import shards, testsets

IMAGE_FIELDS = ("image", "filepath", "file_name", "filename", "path")


def open_sources(names, root, classes=False):
    """Tables; or shards and names as train.py's --data takes them; or folders of class folders.

    -> records, fingerprint (equal only if the records are), warnings
    Raises FileNotFoundError or ValueError.
    """
    if classes:
        opened = [_open_classes(name, root) for name in names]
    else:
        tables = [_find_table(name, root) for name in names]
        if None in tables:
            pairs = data.Pairs(names, root)
            records = ((pairs.name(i), partial(pairs.__getitem__, i)) for i in range(len(pairs)))
            return records, pairs.fingerprint, pairs.warnings
        opened = [_open_table(table) for table in tables]
    records, fingerprints = zip(*opened)
    return chain.from_iterable(records), " + ".join(fingerprints), []


def _find_table(name, root):
    """The table at ROOT/NAME or NAME, or the only one in such a folder; None if it is shards.

    Raises FileNotFoundError if nothing is there, and ValueError if it is neither.
    """
    try:
        data.find_data(name, root)
        return None
    except ValueError:  # it is there, and it is something else
        tables = []
    for path in dict.fromkeys([Path(root, name), Path(name)]):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        tables += [file for file in files if file.suffix.lower() in ROWS and file.is_file()]
    if len(tables) != 1:
        raise ValueError(f"{name} holds no shards (*.tar) and {len(tables)} tables "
                         f"({', '.join(ROWS)}): name one table, or add --classes if its folders "
                         "are classes")
    return tables[0]


def _open_classes(name, root):
    """The pictures of class folders, in an order that mixes the classes of each shard."""
    folder = Path(root, name) if Path(root, name).is_dir() else Path(name)
    paths, labels, names = testsets.class_folder(folder)
    order = np.random.default_rng(0).permutation(len(paths))
    images = [f"{names[label]}/{path.name}" for path, label in zip(paths, labels)]
    rows = ({"image": images[i], "class": names[labels[i]]} for i in order)
    digest = hashlib.sha1("\n".join(images).encode("utf-8", "surrogateescape"))
    return _records(folder, folder, folder, rows), _fingerprint(digest, folder)


def _open_table(path):
    """A table with a picture's path among IMAGE_FIELDS, and TEXT_FIELDS, or "class" for templates.

    Paths are relative to the table's folder, to images/ or the split's folder in it, or to the same
    one level up.  PATH.zip/MEMBER is in a zip.
    """
    path = Path(os.path.abspath(path))
    rows = _rows(path)
    first = list(islice(rows, 100))
    split = path.stem.split("_")[-1]  # COCO: captions_train2017.json and train2017/
    homes = [folder / part for folder in (path.parent, path.parent.parent)
             for part in ("", "images", split)]
    files = [_split_zip(_image_of(row))[0] for row in first]
    homes = [home for home in homes if any(os.path.isfile(home / file) for file in files)]
    if not homes:
        raise FileNotFoundError(f"{path}: none of the first pictures that its records name in "
                                f"{', '.join(IMAGE_FIELDS)} exists ({', '.join(files[:2])})")
    digest = hashlib.sha1()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    records = _records(path, path.parent, homes[0], chain(first, rows))
    return records, _fingerprint(digest, path.parent)


def _fingerprint(digest, folder):
    """A digest of the records, with the files that turn names of classes into captions."""
    for file in (folder / "templates.txt", folder / "words.txt"):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- records

def _records(source, folder, home, rows):
    """The record of each row.  folder: of templates.txt and words.txt; home: of the pictures."""
    templates = testsets.templates_of(folder)
    words = {}  # a line of words.txt is KEY, tab, "name, synonym"
    if (folder / "words.txt").is_file():
        lines = (folder / "words.txt").read_text("utf-8", "replace").splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    for number, row in enumerate(rows, 1):
        yield f"{source}, record {number}", partial(_load, row, home, templates, words)


def _load(row, home, templates, words):
    """-> bytes of a row's picture, its captions: of its class, each name in each template"""
    image = _image_of(row)
    if not image:
        raise FileNotFoundError(f"it names no picture ({', '.join(IMAGE_FIELDS)})")
    label = row.get("class")
    if label and isinstance(label, str):
        names = words.get(label, label.replace("_", " ")).split(", ")
        captions = [template.replace("{}", name) for name in names for template in templates]
    else:
        captions = shards.captions_of(row)
    file, member = _split_zip(image)
    path = Path(home, file)
    if not member:
        return path.read_bytes(), captions
    try:
        return _open_zip(path).read(member), captions
    except (KeyError, zipfile.BadZipFile) as error:
        raise OSError(f"cannot read {member} in {path}: {error}") from error


def _image_of(row):
    """The path of a row's picture, or "" if the row names none."""
    images = [row[field] for field in IMAGE_FIELDS if row.get(field)]
    return images[0] if images and isinstance(images[0], str) else ""


def _split_zip(image):
    """PATH.zip/MEMBER -> PATH.zip, MEMBER; another path -> the path, and an empty member"""
    path, inside, member = image.partition(".zip/")
    return (f"{path}.zip", member) if inside else (image, "")


@lru_cache(64)  # our choice: opening reads a zip's directory, and neighbours share a zip
def _open_zip(path):
    return zipfile.ZipFile(path)


# ---------------------------------------------------------------- rows: a function per format

def _csv_rows(path):
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        yield from csv.DictReader(file)


def _tsv_rows(path):
    """A quote is a character as any other, so these are no CSV with tabs."""
    with open(path, newline="\n", encoding="utf-8-sig", errors="replace") as file:
        lines = (line.rstrip("\r\n").split("\t") for line in file)
        columns = next(lines, [])
        for cells in lines:
            if any(cells):
                yield dict(zip(columns, cells))


def _jsonl_rows(path):
    with open(path, newline="\n", encoding="utf-8-sig", errors="replace") as file:
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
    for record in load_plain_pickle(path):
        if isinstance(record, dict):  # of cc12m.npy image_name is the path, image_id a number
            image = str(record.get("image_name", record.get("image_id")))
            yield dict(image=image, captions=list(record["captions"]))
        else:
            number, *captions = record
            yield dict(image=yfcc_zip(number), captions=captions)


# A new format is added here.  data.py knows none: it answers with the command that packs, whatever
# it finds instead of shards.
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


def load_plain_pickle(path):
    """A .pkl, or a .npy of objects, without running code; UnpicklingError for all but values."""
    with open(path, "rb") as file:
        if path.suffix.lower() == ".npy":
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        content = _PlainUnpickler(file, encoding="latin1").load()  # SLIP's are of Python 2
    return content.items if isinstance(content, _Array) else content
