"""What is done with a data set before training reads it.

    python tools/prepare.py pack table.tsv --out DIR --size 256    a table or a folder -> shards
    python tools/prepare.py pack FOLDER --classes --out DIR        class folders -> shards
    python tools/prepare.py check cc3m                   decode every pair once, name what is bad
    python tools/prepare.py show demo --out sheet.png    random pairs as training sees them
    python tools/prepare.py stats demo                   pairs, words of captions, picture sizes
    python tools/prepare.py yfcc SUBSET.tsv DATASET.txt --out yfcc15m.tsv    YFCC-15M's captions

Ideas: img2dataset and webdataset (layout of the shards), SLIP (cleaning of YFCC-15M's captions).
"""
import argparse
import bz2
import io
import json
import os
import re
import sys
import tarfile
import textwrap
from functools import partial
from itertools import islice, product
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from support.pictures import BAD_IMAGE, decode, open_picture, upright_size
from support.runtime import lock, run_program, sentence_of
from support.shards import add_member, atomic_write, find_shards, in_parallel, is_hidden
from tools import readers

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # others become JPEG
YFCC100M_LINES = 2 ** 27  # more than the 100 million there are


# ---------------------------------------------------------------- pack

def pack(names, root, out, size=0, shard_size=10_000, classes=False):
    """Write all pairs as shards OUT/00000.tar ...; those that are there are kept.

    size: a picture with a longer short side is resized to it (bicubic, JPEG of quality 95 as
    img2dataset); others, and all with 0, keep their bytes.  Each is decoded; bad ones are left out.
    Raises ValueError if OUT holds anything else than shards of the same source and options.
    """
    if size < 0 or shard_size < 1:
        raise ValueError("--size must be 0 or more, and --shard-size 1 or more")
    records, fingerprint, warnings = readers.open_sources(names, root, classes)
    if any(Path(name).is_dir() and Path(name).resolve() in out.resolve().parents
           and not find_shards(name) for name in names):
        raise ValueError(f"{out} lies in the folder that is packed: give another --out")
    settings = dict(source=fingerprint, size=size, shard_size=shard_size, done=False)
    out.mkdir(parents=True, exist_ok=True)
    for line in warnings:
        print(f"warning: {line}")
    with open(out / ".lock", "wb") as guard:
        lock(guard, f"another pack is writing to {out}")
        _write_shards(records, out, settings)


def _write_shards(records, out, settings):
    """The shards that OUT lacks, and pack.json, which says of what they are."""
    file = out / "pack.json"
    packed = json.loads(file.read_bytes()) if file.is_file() else {}
    is_empty = all(is_hidden(path.name) for path in out.iterdir())
    is_same = all(packed.get(name) == settings[name] for name in ("source", "size", "shard_size"))
    if not is_empty and not is_same:
        raise ValueError(f"{out} is not empty, and it was not packed from this source with these "
                         "options: give another --out")
    if packed.get("shards") == len(find_shards(out)):
        print(f"{out}: packed from this source before: {packed['pairs']:,} pairs; left out "
              f"{packed['left_out']:,} records; delete the folder to pack it again")
        return
    with atomic_write(file) as marker:
        marker.write(json.dumps(settings).encode())
    for path in out.glob("*.partial-*"):  # of a run that was killed
        path.unlink()
    n_kept = len(find_shards(out))
    n_pairs = 0
    n_bad = 0
    tasks = _tasks(records, out, settings["shard_size"])
    results = in_parallel(partial(_pack_shard, settings["size"]), tasks)
    for n, bad in tqdm(results, f"packing into {out}", unit=" shards", disable=None):
        n_pairs += n
        for line in bad[:max(0, 10 - n_bad)]:
            print(f"left out: {line}")
        n_bad += len(bad)
    if not n_pairs and not n_kept:
        raise ValueError(f"no pairs to pack; {n_bad:,} records were left out")
    facts = dict(done=True, shards=len(find_shards(out)), pairs=n_pairs, left_out=n_bad)
    with atomic_write(file) as marker:
        marker.write(json.dumps(settings | facts).encode())
    print(f"{out}: packed {n_pairs:,} pairs; kept {n_kept:,} shards of an earlier run; "
          f"left out {n_bad:,} records")


def _tasks(records, out, shard_size):
    """Yield the path and the records of each shard that is not there."""
    number = 0
    while batch := list(islice(records, shard_size)):
        path = out / f"{number:05d}.tar"
        if not path.exists():
            yield path, batch
        number += 1


def _pack_shard(size, task):
    """Write a shard.  -> number of pairs in it, a sentence of each record left out"""
    path, records = task
    bad = []
    with (atomic_write(path) as file,
          tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar):
        for i, (name, load) in enumerate(records):
            try:
                content, captions = load()
                kind = "txt" if len(captions) == 1 else "json"
                text = captions[0]
                if kind == "json":
                    text = json.dumps(dict(captions=captions), ensure_ascii=False)
                text = text.encode()  # ValueError for what was not UTF-8, half of a surrogate pair
                content, suffix = _packed_picture(content, size)
            except BAD_IMAGE as error:
                bad.append(f"{name}: {sentence_of(error)}")
                continue
            key = f"{path.stem}{i:05d}"
            add_member(tar, f"{key}.{suffix}", content)
            add_member(tar, f"{key}.{kind}", text)
    if len(bad) == len(records):
        path.unlink()  # an empty shard would be kept by the next run
    return len(records) - len(bad), bad


def _packed_picture(content, size):
    """-> bytes of the picture's file in the shard, and its suffix.  Raises one of BAD_IMAGE."""
    image = open_picture(content)
    suffix = SUFFIXES.get(image.format)
    shrink = min(image.size) / size if size else 1.0
    image = decode(image, shrink / 2)  # twice the size: bicubic needs it
    if suffix and shrink <= 1:
        return content, suffix
    if shrink > 1:
        shrink = min(image.size) / size
        image = image.resize([round(side / shrink) for side in image.size], Image.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), "jpg"


# ---------------------------------------------------------------- check, show, stats

def check(pairs):
    """Decode every pair once and print those that are bad.  Raises ValueError if there are any."""
    tasks = [(source, start) for source in pairs.sources for start in range(0, len(source), 1000)]
    n_bad = 0
    for bad in tqdm(in_parallel(_check, tasks), "checking", len(tasks), disable=None):
        n_bad += len(bad)
        for line in bad:
            print(line)
    print(f"{n_bad:,} of {sum(map(len, pairs.sources)):,} pairs are bad")
    if n_bad or pairs.warnings:
        raise ValueError(f"{n_bad:,} pairs are bad, and of {len(pairs.warnings)} shards a warning "
                         "says what cannot be used; prepare.py pack leaves it out")


def _check(task):
    source, start = task  # not of Pairs, which hold a source of weight 2 twice
    bad = []
    for i in range(start, min(start + 1000, len(source))):
        try:
            decode(source.read(i)[0])
        except BAD_IMAGE as error:
            bad.append(f"{source.name(i)}: {sentence_of(error)}")
    return bad


def show(pairs, out, seed=0):
    """A contact sheet of 24 random pairs, each once, cropped as in training, over one caption."""
    size = 224  # pixels
    width = size + 8
    height = size + 70  # four lines of text
    sheet = Image.new("RGB", (6 * width, 4 * height), "white")
    pen = ImageDraw.Draw(sheet)
    rng = np.random.default_rng(seed)
    corners = product(range(4, 4 * height, height), range(4, 6 * width, width))
    chosen = rng.choice(len(pairs), min(24, len(pairs)), replace=False).tolist()
    for (y, x), i in zip(corners, chosen):
        try:
            content, captions = pairs[i]
            image = decode(content)
            text = captions[int(rng.integers(len(captions)))]
            box = data.crop_box(*image.size, (0.5, 1.0), rng)  # SLIP recipe
            sheet.paste(data.crop(image, box, size), (x, y))
        except BAD_IMAGE as error:
            text = f"bad pair: {sentence_of(error)}"
        pen.text((x, y + size), textwrap.fill(text, size // 6, max_lines=4), fill="black")
    sheet.save(out)
    print(out)


def stats(pairs, limit=2_000):
    """Print the pairs of each source, and sizes of about `limit` pairs, spread evenly."""
    for source in pairs.sources:
        print(f"{len(source):,} pairs in {len(source.sizes):,} shards: {source.folder}")
    rows = []
    for i in range(0, len(pairs), max(1, len(pairs) // limit)):
        try:
            content, captions = pairs[i]
            sides = sorted(upright_size(open_picture(content)))
        except BAD_IMAGE:
            continue  # check names it
        rows += [(len(caption.split()), *sides) for caption in captions]
    if not rows:
        raise ValueError("none of the pairs can be read: prepare.py check says why")
    values = np.percentile(rows, (50, 95, 100), axis=0)  # (3, 3)
    titles = ("words of a caption", "shorter side", "longer side")
    for title, (median, high, most) in zip(titles, values.T):
        print(f"{title}: median {median:,.0f}, 95 % {high:,.0f}, most {most:,.0f}")


# ---------------------------------------------------------------- YFCC-15M

def clean_yfcc(text):
    """A title or description of YFCC100M's table as SLIP cleaned it.

    Unquoted, without links, bold, italics and URLs; in addition, white space is made single.
    """
    text = unquote(text).replace("+", " ")
    text = re.sub(r"<a.*?>|</a>|<b>|</b>|<i>|</i>", "", text)
    return " ".join(re.sub(r"http\S+|www\S+", "", text).split())


def yfcc(subset, dataset, out, hashed=False):
    """OpenAI's list of YFCC-15M and YFCC100M's table -> a table of image, url, title, description.

    subset: lines of (line number, photo identifier, hash).  dataset: 25 columns of which the first
    three are the same, the ninth and tenth title and description, the 17th the URL.  Either may be
    .bz2.  image: SLIP's path in zips, or with `hashed` that of the public bucket, HAS/HHA/HASH.jpg.
    """
    if out.exists():
        raise ValueError(f"{out} exists: delete it, or give another --out")
    wanted = np.zeros(YFCC100M_LINES, bool)
    for number, _ in _numbered_lines(subset):
        wanted[number] = True
    n_rows = 0
    with atomic_write(out) as file:
        file.write(b"image\turl\ttitle\tdescription\n")
        for number, cells in _numbered_lines(dataset):
            if not wanted[number]:
                continue
            if len(cells) != 25:
                raise ValueError(f"{dataset}: line {number} has {len(cells)} columns, not 25")
            texts = [clean_yfcc(cell) for cell in cells[8:10]]
            if any(texts):
                name = cells[2]
                image = f"{name[:3]}/{name[3:6]}/{name}.jpg" if hashed else readers.yfcc_zip(number)
                file.write("\t".join([image, cells[16], *texts]).encode() + b"\n")
                n_rows += 1
    print(f"{out}: {n_rows:,} of {wanted.sum():,} pictures have captions")


def _numbered_lines(path):
    """Yield the number in the first cell, and the cells, of each line of a table."""
    try:
        with bz2.open(path) if path.endswith(".bz2") else open(path, "rb") as file:
            for line in tqdm(file, f"reading {path}", unit=" lines", disable=None):
                cells = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
                if not cells[0].isdigit() or int(cells[0]) >= YFCC100M_LINES:
                    raise ValueError(f"{path}: a line must begin with its number in YFCC100M's "
                                     f"table, not '{cells[0][:80]}'")
                yield int(cells[0]), cells
    except EOFError as error:
        raise ValueError(f"{path} is cut off: {error}") from error


# ---------------------------------------------------------------- command line

def run(args):
    """Do what the command line asks for."""
    if args.command == "pack":
        pack(args.data, args.root, args.out, args.size, args.shard_size, args.classes)
    elif args.command == "yfcc":
        yfcc(args.subset, args.dataset, args.out, args.hashed)
    else:
        pairs = data.Pairs(args.data, args.root)
        for line in pairs.warnings:
            print(f"warning: {line}")
        if args.command == "check":
            check(pairs)
        elif args.command == "show":
            show(pairs, args.out, args.seed)
        else:
            stats(pairs)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="command", required=True)
    names = ("pack", "check", "show", "stats", "yfcc")
    commands = {name: parsers.add_parser(name) for name in names}
    for name in names[:4]:
        commands[name].add_argument("data", nargs="+", help="as train.py's --data; pack takes "
                                    f"tables too, {', '.join(readers.ROWS)}")
        commands[name].add_argument("--root", default=os.environ.get("MASKCLIP_DATA", "data"))
    for name, what in (("pack", "folder of shards"), ("show", "NAME.png"), ("yfcc", "NAME.tsv")):
        commands[name].add_argument("--out", type=Path, required=True, help=what)
    commands["pack"].add_argument("--classes", action="store_true",
                                  help="a folder with a folder of pictures for each class")
    commands["pack"].add_argument("--size", type=int, default=0,
                                  help="resize longer short sides to so many pixels")
    commands["pack"].add_argument("--shard-size", type=int, default=10_000, help="pairs a shard")
    commands["show"].add_argument("--seed", type=int, default=0)
    commands["yfcc"].add_argument("subset", help="OpenAI's yfcc100m_subset_data.tsv")
    commands["yfcc"].add_argument("dataset", help="YFCC100M's yfcc100m_dataset.txt")
    commands["yfcc"].add_argument("--hashed", action="store_true",
                                  help="pictures are named by hash, as in the public bucket")
    args = parser.parse_args(argv)
    run_program("prepare.py", lambda: run(args))


if __name__ == "__main__":
    main()
