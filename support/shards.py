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

from support.pictures import MOST_BYTES

# Of several pictures of a key the first of these counts: a PNG next to a JPEG is often a mask.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".webp", ".png", ".ppm", ".bmp", ".gif")
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
                pool.close()  # terminate() would signal a process that is still starting
                pool.join()
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
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error  # a full disk names none
    finally:
        incomplete.unlink(missing_ok=True)


def add_member(tar, name, content):
    """Write bytes as a file of a tar.  All else is constant: equal pairs make equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def paths_of(name, root):
    """Where a data set may lie: a name under root first, what looks like a path (a/b, ./a) not."""
    paths = [Path(root, name), Path(name)]
    return list(dict.fromkeys(reversed(paths) if os.sep in str(name) else paths))


def find_shards(folder):
    """The tars of a folder that are not hidden, sorted.  -> list of Path, [] if there is none"""
    return sorted(path for path in Path(folder).glob("*.tar") if path.name[0] != ".")


def is_hidden(name):
    """Whether a file or a folder in its path is not the user's: .ipynb_checkpoints, ._a.jpg."""
    return any(part[:1] == "." and part not in (".", "..") or part == "__MACOSX"
               for part in str(name).split("/"))


def parse_captions(content, is_json):
    """The captions in the bytes of a .txt or .json file.  ValueError: there are none, not UTF-8."""
    text = content.decode("utf-8-sig")
    try:
        return captions_of(json.loads(text) if is_json else dict(text=text))
    except RecursionError as error:
        raise ValueError("json nested too deeply") from error


def captions_of(record):
    """The TEXT_FIELDS of a record (dict) that are not empty.  ValueError: none, or no text."""
    captions = []
    for field in TEXT_FIELDS if isinstance(record, dict) else ():
        value = record.get(field)
        texts = value if isinstance(value, list) else [value or ""]
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError(f"its {field} is no text: {str(value)[:80]!r}")
        captions += [text.strip() for text in texts if text.strip()]
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
    """Read one shard's headers.  -> its pairs (ROW), a warning or '', a checksum of its content"""
    images = {}     # key -> {rank of its suffix: position}; of several the lowest rank counts
    texts = {}
    left_out = []
    warnings = []
    is_whole = False
    checksum = 0    # of names, texts and the last bytes of pictures, which are read on the way
    try:
        with tarfile.open(Path(folder, name), "r:") as tar:
            for member in tar:
                key, suffix = os.path.splitext(member.name)
                suffix = suffix.lower()
                is_image = suffix in IMAGE_SUFFIXES
                if is_hidden(key) or not is_image and suffix not in (".txt", ".json"):
                    continue
                if not member.isreg() or member.issparse() or member.size > MOST_BYTES:
                    left_out.append(key)
                    continue
                files = (images if is_image else texts).setdefault(key, {})
                rank = IMAGE_SUFFIXES.index(suffix) if is_image else int(suffix == ".json")
                if suffix == ".txt" and not member.size:
                    rank = 2  # it counts if there is no .json
                if rank in files or files and is_image:
                    left_out.append(key)
                files[rank] = (member.offset_data, member.size)
                n_read = min(512, member.size) if is_image else member.size
                content = os.pread(tar.fileobj.fileno(), n_read, sum(files[rank]) - n_read)
                label = f"{member.name} {member.size} ".encode("utf-8", "surrogateescape")
                checksum = zlib.crc32(label + content, checksum)
            # A complete tar ends in zeros; at a cut off header tarfile ends without an error.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it ends early")
            is_whole = True
            if tar.fileobj.read(2 ** 20).strip(b"\0"):
                warnings.append("holds a second archive after its end, which is left out: unpack "
                                "both and make one tar of them")
    except (tarfile.TarError, OSError) as error:
        with open(Path(folder, name), "rb") as file:
            gzip = "compressed by gzip: decompress it; " if file.read(2) == b"\x1f\x8b" else ""
        warnings.append(f"is damaged ({gzip}{error}): the pairs before the damage are used")
    _join_by_first_dot(images, texts)
    alone = len(images.keys() ^ texts.keys())
    if left_out:
        warnings.append(f"holds {len(left_out)} pictures or texts that are left out, because their "
                        f"key has another one, or they are links, sparse or huge ({left_out[0]})")
    if alone and is_whole:
        warnings.append(f"holds {alone} pictures or captions that have no partner and are left out")
    rows = []
    for key in images:
        if key in texts:
            image, text = min(images[key]), min(texts[key])
            rows.append((*images[key][image], *texts[key][text], text == 1))
    return np.array(rows, ROW), "; it ".join(warnings), checksum


def _join_by_first_dot(images, texts):
    """0001.text.txt is the text of 0001.image.jpg: in webdataset a key ends at its first dot."""
    groups = {}
    for key in images.keys() ^ texts.keys():
        folder, _, name = key.rpartition("/")
        groups.setdefault((folder, name.partition(".")[0]), []).append(key)
    for keys in groups.values():
        pictures = [key for key in keys if key in images]
        if len(keys) == 2 and len(pictures) == 1:  # of several texts none is guessed
            keys.remove(pictures[0])
            texts[pictures[0]] = texts.pop(keys[0])


def _build_index(folder, state):
    """Write an index: a line of JSON, then the rows of all shards.  -> as _read_index"""
    results = in_parallel(partial(_scan_shard, folder), state)
    scanned = list(tqdm(results, "reading headers", len(state), disable=None, leave=False))
    rows, warnings, checksums = zip(*scanned)
    header = dict(state=state, counts=list(map(len, rows)), warnings=warnings, checksums=checksums)
    path = index_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.writelines(part.tobytes() for part in rows)
    return dict(zip(state, scanned))


def _read_index(path, state):
    """-> {shard: (rows, warning, checksum)}; None if there is no complete index of this state"""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            rows = np.asarray(np.memmap(file, ROW, "r", file.tell()))  # mapped into memory
    except (OSError, ValueError):
        return None
    if (not isinstance(header, dict) or header.get("state") != state
            or "checksums" not in header  # an older version's
            or len(rows) != sum(header["counts"])):
        return None
    ends = np.cumsum(header["counts"])
    columns = np.split(rows, ends[:-1]), header["warnings"], header["checksums"]
    return dict(zip(state, zip(*columns)))


class Shards:
    """The pairs of some shards of one folder: names, in this order.

    sizes: (n_shards,) int64, pairs of each.  warnings: sentences.  fingerprint: of the content.
    A shard that is cut off gives the pairs before the cut.  One that changes after it was indexed
    has bad pairs from then on.
    """

    def __init__(self, folder, names):
        self.folder = os.path.abspath(folder)
        self.names = list(names)
        self._open = lru_cache(OPEN_FILES)(partial(open, mode="rb"))
        stats = {path.name: path.stat() for path in find_shards(self.folder)}
        state = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        self._state = state
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
        content = [(name, index[name][2]) for name in self.names]
        self.fingerprint = f"{zlib.crc32(repr(content).encode()):08x}"

    def __len__(self):
        return int(self.sizes.sum())

    def __reduce__(self):  # a process that starts afresh maps the index itself
        return Shards, (self.folder, self.names)

    def _find(self, i):
        """-> name of the shard, the pair's row (a tuple as ROW)"""
        shard = int(self._ends.searchsorted(i, "right"))
        row = self._rows[shard][i - self._ends[shard]]  # below 0: counted from the shard's end
        return self.names[shard], row.item()

    def _bytes(self, name, offset, size):
        file = self._open(f"{self.folder}/{name}").fileno()
        stat = os.fstat(file)
        if [stat.st_size, stat.st_mtime_ns] != self._state[name]:
            raise OSError(f"{self.folder}/{name} has changed since it was indexed")
        content = os.pread(file, size, offset)
        if len(content) < size:
            raise OSError(f"{self.folder}/{name} ends within this pair")
        return content

    def read(self, i):
        """-> bytes of the picture file, [captions].  Raises ValueError or OSError."""
        shard, (offset, size, *_) = self._find(i)
        return self._bytes(shard, offset, size), self.captions(i)

    def captions(self, i):
        """-> [captions], at least one.  Raises ValueError or OSError."""
        shard, (_, _, offset, size, is_json) = self._find(i)
        return parse_captions(self._bytes(shard, offset, size), is_json)

    def name(self, i):
        """Where a pair lies, for messages."""
        shard, row = self._find(i)
        return f"{self.folder}/{shard} at byte {row[2]}"
