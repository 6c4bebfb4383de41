"""Tar shards of (picture, captions) pairs, read in any order by an index.

The layout is img2dataset's and webdataset's: KEY.jpg (or another of IMAGE_SUFFIXES) with KEY.txt,
or with the TEXT_FIELDS of KEY.json.  An index, built once from the headers of the tars, allows an
exact order, where webdataset streams and shuffles in a buffer.

    shards = Shards("data/demo/train", ["00000.tar", "00001.tar"])
    content, captions = shards.read(0)
"""
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import zlib
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
TEXT_FIELDS = ("caption", "captions", "title", "description", "text")
INDEX_NAME = "pairs.index"
# One row a pair: where the picture and the text lie in their shard.  25 bytes: 15 million pairs
# take 375 MB, which all processes of a machine share.
ROW = np.dtype([("image", "<u8"), ("image_size", "<u4"),
                ("text", "<u8"), ("text_size", "<u4"), ("is_json", "?")])
OPEN_FILES = 64  # our choice: shards that a process keeps open; to open is slow on network disks


def cpu_count():
    """Cores that this process may use: under a scheduler fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _child_signals():
    """Ctrl-C reaches the processes of a pool too, but the main process ends them, by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def in_parallel(function, items):
    """Yield function(item) of each item, in order, by one process a core.

    Raises what the function raises, and OSError if a process is killed.
    """
    with multiprocessing.Pool(cpu_count(), _child_signals) as pool:
        processes = multiprocessing.active_children()
        results = pool.imap(function, items)
        while True:
            try:
                yield results.next(timeout=1.0)
            except StopIteration:
                return
            except multiprocessing.TimeoutError as error:  # a lost item would be awaited forever
                if any(process.exitcode for process in processes):
                    raise OSError("a process was killed, probably for lack of memory") from error


@contextlib.contextmanager
def atomic_write(path):
    """Open a binary file for writing that takes its name when it is complete."""
    path = Path(path)
    incomplete = path.with_name(f"{path.name}.partial-{os.urandom(6).hex()}")
    try:
        with open(incomplete, "wb") as file:
            yield file
        os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)


def add_member(tar, name, content):
    """Write bytes as a file of a tar.  All else is constant: equal pairs make equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def find_shards(folder):
    """The tars of a folder that are not hidden, sorted.  -> list of Path, [] if there is none"""
    return sorted(path for path in Path(folder).glob("*.tar") if path.name[0] != ".")


def captions_of(record):
    """The TEXT_FIELDS of a record (dict) that are not empty.  ValueError if there is none."""
    captions = []
    for field in TEXT_FIELDS if isinstance(record, dict) else ():
        value = record.get(field)
        texts = value if isinstance(value, list) else [value]
        captions += [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise ValueError("empty caption")
    return captions


def index_path(folder):
    """Where a folder's index is written: in it, or in the user's cache if it is read-only."""
    if os.access(folder, os.W_OK):
        return Path(folder, INDEX_NAME)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    code = hashlib.sha1(os.fsencode(os.path.abspath(folder))).hexdigest()[:16]
    return Path(cache, "maskclip", f"{code}-{INDEX_NAME}")


def _scan_shard(folder, name):
    """Read one shard's headers.  -> its pairs (ROW), a warning or ''"""
    images = {}
    texts = {}
    warning = ""
    try:
        with tarfile.open(Path(folder, name), "r:") as tar:
            for member in tar:
                key, suffix = os.path.splitext(member.name)
                suffix = suffix.lower()
                if os.path.basename(key).startswith("."):
                    continue  # macOS adds ._NAME to each file
                if suffix in IMAGE_SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif suffix == ".txt" or suffix == ".json" and key not in texts:
                    texts[key] = (member.offset_data, member.size, suffix == ".json")
            # A complete tar ends in zeros; at a cut off header tarfile ends without an error.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it ends early")
    except (tarfile.TarError, OSError) as error:
        warning = f"is damaged ({error}): the pairs before the damage are used"
    alone = len(images.keys() ^ texts.keys())
    if alone and not warning:
        warning = f"holds {alone} pictures or captions that have no partner and are left out"
    return np.array([(*images[key], *texts[key]) for key in images if key in texts], ROW), warning


def _build_index(folder, state):
    """Write an index: a line of JSON, then the rows of all shards.  -> as _read_index"""
    results = in_parallel(partial(_scan_shard, folder), state)
    scanned = list(tqdm(results, "reading headers", len(state), disable=None, leave=False))
    header = dict(state=state, counts=[len(rows) for rows, _ in scanned],
                  warnings=[warning for _, warning in scanned])
    path = index_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.writelines(rows.tobytes() for rows, _ in scanned)
    return dict(zip(state, scanned))


def _read_index(path, state):
    """-> {name of a shard: (rows, warning)}; None if there is no complete index of this state"""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            rows = np.asarray(np.memmap(file, ROW, "r", file.tell()))  # mapped into memory
    except (OSError, ValueError):
        return None
    if header.get("state") != state or len(rows) != sum(header["counts"]):
        return None
    ends = np.cumsum(header["counts"])
    return dict(zip(state, zip(np.split(rows, ends[:-1]), header["warnings"])))


class Shards:
    """The pairs of some shards of one folder: names, in this order.

    sizes: (n_shards,) int64, pairs of each.  warnings: sentences.  fingerprint: of names and sizes.
    A shard that is cut off gives the pairs before the cut.
    """

    def __init__(self, folder, names):
        self.folder = os.path.abspath(folder)
        self.names = list(names)
        self._open = lru_cache(OPEN_FILES)(partial(open, mode="rb"))
        stats = {path.name: path.stat() for path in find_shards(self.folder)}
        state = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        index = (_read_index(Path(self.folder, INDEX_NAME), state)  # also if it is read-only
                 or _read_index(index_path(self.folder), state) or _build_index(self.folder, state))
        self._rows = [index[name][0] for name in self.names]
        self.sizes = np.array([len(rows) for rows in self._rows], np.int64)
        self._ends = np.cumsum(self.sizes)
        self.warnings = [f"{self.folder}/{name} {index[name][1]}"
                         for name in self.names if index[name][1]]
        packed = Path(self.folder, "pack.json")
        if packed.is_file() and '"done": false' in packed.read_text("utf-8", "replace"):
            self.warnings.append(f"{self.folder} is not packed to the end: the same command of "
                                 "tools/prepare.py pack resumes it")
        files = [(name, state[name][0]) for name in self.names]
        self.fingerprint = f"{zlib.crc32(repr((files, self.sizes.tolist())).encode()):08x}"

    def __len__(self):
        return int(self.sizes.sum())

    def __reduce__(self):  # a process that starts afresh maps the index itself
        return Shards, (self.folder, self.names)

    def _find(self, i):
        """-> path of the shard, the pair's row (a tuple as ROW)"""
        shard = int(self._ends.searchsorted(i, "right"))
        row = self._rows[shard][i - self._ends[shard]]  # below 0: counted from the shard's end
        return f"{self.folder}/{self.names[shard]}", row.item()

    def _bytes(self, path, offset, size):
        content = os.pread(self._open(path).fileno(), size, offset)
        if len(content) < size:
            raise OSError(f"{path} is shorter than it was when it was indexed")
        return content

    def read(self, i):
        """-> bytes of the picture file, [captions].  Raises ValueError or OSError."""
        path, (offset, size, *_) = self._find(i)
        return self._bytes(path, offset, size), self.captions(i)

    def captions(self, i):
        """-> [captions], at least one.  Raises ValueError or OSError."""
        path, (_, _, offset, size, is_json) = self._find(i)
        text = self._bytes(path, offset, size).decode("utf-8-sig", "replace")
        try:
            return captions_of(json.loads(text) if is_json else dict(text=text))
        except RecursionError as error:
            raise ValueError("json nested too deeply") from error

    def name(self, i):
        """Where a pair lies, for messages."""
        path, row = self._find(i)
        return f"{path} at byte {row[2]}"
