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
import unicodedata
import zipfile
from fnmatch import fnmatch
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np

import data
from support import shards, testsets
from support.pictures import read_file, read_member

IMAGE_FIELDS = ("image", "filepath", "file_name", "filename", "path")
# A row whose None holds a sentence cannot be used; pack counts and names it.
TOO_MANY = "it has more cells than the table's first line: quote a text that has the separator"
PANDAS = re.compile(r'"[^"]*(""[^"]*)+"')  # a cell in quotes, in which quotes are doubled


def open_sources(names, root, classes=False):
    """A table, a folder, class folders; or shards and names as train.py's --data takes them.

    -> records, fingerprint (equal only if the records are), warnings
    Raises FileNotFoundError or ValueError.
    """
    if classes and len(names) > 1:
        raise ValueError("--classes takes one folder of class folders at a time")
    paths = [path for path in shards.paths_of(names[0], root) if path.exists()]
    path = paths[0] if paths else Path(names[0])
    if classes:
        return _open_classes(path)
    if len(names) == 1 and path.is_file() and path.suffix.lower() in ROWS:
        return _open_table(path)
    if len(names) == 1 and path.is_dir():
        if not any(map(shards.find_shards, (path, path / "train"))):
            return _open_folder(path)
        if _tables(path):
            raise ValueError(f"{path} holds shards and {_tables(path)[0].name}: name one of them")
    try:
        pairs = data.Pairs(names, root)
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: give one table ({', '.join(ROWS)}), or one folder, "
                         "or shards (*.tar)") from error
    records = ((pairs.name(i), partial(pairs.__getitem__, i)) for i in range(len(pairs)))
    return records, pairs.fingerprint, pairs.warnings


def _open_classes(folder):
    """The pictures of class folders, in an order that mixes the classes of each shard.

    A class has a caption for each of its names in words.txt and each line of templates.txt.
    """
    paths, labels, names, warnings = testsets.class_folder(folder)
    has_ids = all(re.fullmatch(r"n\d{8}", name) for name in names)
    if has_ids and not (folder / "words.txt").is_file():
        raise ValueError(f"{folder} has WordNet ids for classes: write words.txt, FOLDER<tab>NAME")
    templates = testsets.templates_of(folder)
    captions = [[template.replace("{}", name) for name in synonyms for template in templates]
                for synonyms in testsets.read_names(folder, names)]  # of each class
    images = [str(path.relative_to(folder)) for path in paths]
    order = np.random.default_rng(0).permutation(len(paths))
    rows = (dict(image=images[i], captions=captions[labels[i]]) for i in order)
    fingerprint = hashlib.sha1(repr((images, captions)).encode()).hexdigest()[:16]
    return _records(folder, [folder], rows), fingerprint, warnings


def _open_folder(folder):
    """Pictures with KEY.txt or KEY.json next to them (img2dataset's files), or the table there.

    Classes are not guessed.  Raises ValueError that says what was seen.
    """
    pictures, others = testsets.picture_files(folder)
    texts = [path for path in others if path.suffix in (".txt", ".json")
             and not path.stem.endswith("_stats")]  # img2dataset's
    files_of = {}  # key -> its pictures, its texts
    for number, paths in enumerate((pictures, texts)):
        for path in paths:
            files_of.setdefault(path.with_suffix(""), ([], []))[number].append(path)
    has_pairs = any(all(files) for files in files_of.values())
    tables = _tables(folder)
    if has_pairs and not tables:
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
                 for path in (*pictures, *texts) if path.exists()]
        records = ((str(key), partial(_load_files, *files)) for key, files in files_of.items())
        return records, hashlib.sha1(repr(stats).encode()).hexdigest()[:16], []
    if len(tables) == 1 and not has_pairs:
        return _open_table(tables[0])
    others = [path for path in others if path.parent in (folder, folder / "annotations")]
    homes = ", ".join(sorted({str(path.parent.relative_to(folder)) for path in pictures})[:5])
    seen = ", ".join(str(path.relative_to(folder)) for path in others[:5]) or "no other file"
    raise ValueError(f"{folder} has {len(pictures):,} pictures{f' in {homes}' if homes else ''}, "
                     f"and {seen}; pictures with KEY.txt or KEY.json next to them, or one table, "
                     f"are read: name its table ({', '.join(ROWS)}), or add --classes if its "
                     "folders are classes")


def _tables(folder):
    """The tables in a folder or its annotations/, by their names."""
    names = ("*.csv", "*.tsv", "*.jsonl", "*.token", "captions.txt", "captions_*.json")
    paths = [path for home in (folder, folder / "annotations") if home.is_dir()
             for path in sorted(home.iterdir()) if not shards.is_hidden(path.name)]
    return [path for path in paths if any(fnmatch(path.name.lower(), name) for name in names)]


def _load_files(pictures, texts):
    """-> bytes of a picture, the captions in KEY.txt or else KEY.json next to it"""
    if len(pictures) != 1:
        raise ValueError(f"{len(pictures)} pictures with this name")
    for text in sorted(texts, reverse=True):  # .txt before .json
        if text.suffix == ".json" or text.stat().st_size:
            captions = shards.parse_captions(text.read_bytes(), text.suffix == ".json")
            return read_file(pictures[0]), captions
    raise FileNotFoundError("no text in KEY.txt or KEY.json next to it")


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
             for part in ("", "images", "Images", "flickr30k-images", split)]
    files = [re.sub(r"\.zip/.*", ".zip", _image_of(row)) for row in first]
    fields = {field for row in first for field in row}
    if not any(files) or fields.isdisjoint((None, *shards.TEXT_FIELDS)):
        columns = ", ".join(map(repr, first[0])) if first else "none"
        raise ValueError(f"{path}: a column of pictures ({', '.join(IMAGE_FIELDS)}) and one of "
                         f"captions ({', '.join(shards.TEXT_FIELDS)}) are needed, and it has "
                         f"{columns[:200]} (a .csv with tabs is a .tsv)")
    found = [home for home in homes if any(os.path.isfile(home / file) for file in files)]
    if not found:
        raise FileNotFoundError(f"{path}: none of the first pictures that its records name in "
                                f"{', '.join(IMAGE_FIELDS)} exists ({', '.join(files[:2])})")
    fingerprint = hashlib.sha1(np.memmap(path, mode="r")).hexdigest()[:16]
    homes = list(dict.fromkeys([*found, *homes]))  # where most are is looked into first
    return _records(path, homes, chain(first, rows)), fingerprint, []


# ---------------------------------------------------------------- a record

def _records(source, homes, rows):
    """The record of each row.  homes: folders in which pictures are looked for."""
    for number, row in enumerate(rows, 1):
        yield f"{source}, record {number}", partial(_load, row, homes)


def _load(row, homes):
    """-> bytes of a row's picture, its captions"""
    if None in row:
        raise ValueError(row[None])
    image = _image_of(row)
    if not image:
        raise FileNotFoundError(f"it names no picture ({', '.join(IMAGE_FIELDS)})")
    captions = shards.captions_of(row)
    archive, inside, member = image.partition(".zip/")
    name = f"{archive}.zip" if inside else image
    # macOS writes é as two characters (NFD), so a table may spell a file's name in another way.
    spellings = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    paths = [Path(home, spelling) for home in homes for spelling in spellings]
    path = next(filter(Path.exists, paths), paths[0])
    if not inside:
        return read_file(path), captions
    try:
        return read_member(_open_zip(path), member), captions
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
    """Raises ValueError for a quote that is not closed: it takes all lines up to the next quote."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, strict=True)
        _check_columns(rows.fieldnames or [])
        line = 1
        try:
            for row in rows:
                line = rows.line_num + 1
                yield {None: TOO_MANY} if None in row else row
        except csv.Error as error:
            raise ValueError(f"the row that begins at line {line} has a quote that is not closed, "
                             f"or text after its closing quote ({error})") from error


def _tsv_rows(path):
    """A quote and a lone carriage return are characters as any other: no CSV with tabs.

    But pandas puts a cell with quotes into quotes, and doubles those in it.
    """
    with open(path, newline="\n", encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = (line.rstrip("\r\n").split("\t") for line in file)
        columns = next(lines, [])
        _check_columns(columns)
        for cells in filter(any, lines):
            cells = [cell[1:-1].replace('""', '"') if PANDAS.fullmatch(cell) else cell
                     for cell in cells]
            row = dict(zip(columns, cells))
            yield row if len(cells) <= len(columns) else {None: TOO_MANY}


def _check_columns(columns):
    if len(set(columns)) < len(columns):
        raise ValueError(f"its first line has a name twice: {', '.join(map(str, columns))}")


def _caption_rows(path):
    """Kaggle's Flickr8k: captions.txt, lines image,caption; several lines a picture."""
    yield from _grouped(_csv_rows(path))


def _token_rows(path):
    """Flickr8k's and Flickr30k's: lines IMAGE#NUMBER, tab, caption; several lines a picture."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        cells = (line.rstrip("\n").partition("\t") for line in file)
        yield from _grouped(dict(image=image.rpartition("#")[0], caption=caption)
                            for image, _, caption in cells)


def _grouped(rows):
    """Consecutive rows of a picture as one."""
    for image, same in groupby(rows, _image_of):
        good = []
        for row in same:
            if None in row:
                yield row
            else:
                good.append(row["caption"])
        if good:
            yield dict(image=image, captions=good)


def _jsonl_rows(path):
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else {None: "it is no JSON object"}


def _coco_rows(path):
    content = json.loads(path.read_bytes())
    captions = {}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    if len(names) < len(content["images"]):
        raise ValueError("two pictures have one id")
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for key in [*names, *(captions.keys() - names.keys())]:
        yield dict(image=names.get(key, ""), captions=captions.get(key, []))


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


ROWS = {".csv": _csv_rows, ".tsv": _tsv_rows, ".jsonl": _jsonl_rows, ".json": _coco_rows,
        ".txt": _caption_rows, ".token": _token_rows, ".pkl": _slip_rows, ".npy": _slip_rows}


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
