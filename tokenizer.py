"""Byte-level BPE for captions: CLIP's tokenizer to the id, or one trained on your own captions.

Ideas: BPE (Sennrich et al. 2016), GPT-2's byte table, OpenAI's CLIP (simple_tokenizer.py), open_clip 3.3.0.
Ours: encode remembers whole words; train keeps its pair counts up to date instead of recounting.

    tok = Tokenizer.clip()                             # CLIP's 49,408 ids, and [MASK] as one more
    tok = Tokenizer.train(captions, vocab_size=8192)   # or your own; tok.save(path), Tokenizer.load(path)
    tok(["a photo of a dog"])                          # LongTensor (1, 7): start, five words, end
"""
import gzip
import hashlib
import heapq
import html
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
import torch

SOT, EOT, MASK = "<|startoftext|>", "<|endoftext|>", "[MASK]"
# CLIP's pattern. No piece holds white space, so splitting at white space first changes nothing.
PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.I)
# GPT-2's table from bytes to printable characters, in the order that gives CLIP's first 256 ids.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE}
BYTE_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
FIXED = 2 * 256 + 3                    # in every vocabulary: bytes, bytes that end a word, start, end, [MASK]
HEADER = "#maskclip bpe 1"             # first line of a saved vocabulary
CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_MERGES = 49152 - 256 - 2          # CLIP uses only so many of the file's 262,144 merges
CLIP_WHEEL = "open_clip_torch==3.3.0"  # its wheel carries the file; nothing of it is installed or imported
CACHE_WORDS = 2**18                    # our choice: see Tokenizer.encode


def words(text):
    """CLIP's cleaning of a str (mojibake, HTML entities, lower case, white space) -> list of words."""
    # In printable ASCII without "&" there is nothing that ftfy or html.unescape would change.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # here, for it takes 0.03 s of every start
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower().split()


def symbols_of(piece):
    """The symbols a piece starts from: one for each byte, the last with the mark of a word's end."""
    if piece in (SOT, EOT):
        return [piece]
    symbols = [BYTE_TO_CHAR[byte] for byte in piece.encode("utf-8")]
    symbols[-1] += "</w>"
    return symbols


def merge(symbols, pair):
    """The list of symbols with each occurrence of the pair, from the left, made one symbol."""
    merged = symbols[:1]
    for symbol in symbols[1:]:
        if (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def write_atomically(path, data):
    """Writes bytes beside path, then renames: no reader, nor a second process, ever sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


class Tokenizer:
    """A vocabulary and its use. len(tok) counts every id; tok.sot, tok.eot, tok.mask are the last three.

    tok.merges, a list of (left, right) pairs of str, is all to store: Tokenizer(tok.merges) gives equal ids.
    """

    def __init__(self, merges):
        self.merges = [(left, right) for left, right in merges]
        chars = list(BYTE_TO_CHAR.values())
        vocabulary = [*chars, *(char + "</w>" for char in chars), *map("".join, self.merges), SOT, EOT, MASK]
        self.symbols = dict(enumerate(vocabulary))
        self.ids = {symbol: i for i, symbol in self.symbols.items()}
        self.sot, self.eot, self.mask = (self.ids[symbol] for symbol in (SOT, EOT, MASK))
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.cache = {}  # word -> tuple of ids

    def __len__(self):
        return len(self.symbols)

    def __call__(self, texts, context_length=77):
        """A str or a list of B str -> LongTensor (B, L), L = longest row <= context_length (77: CLIP).

        A row is start, ids, end, then 0s. A longer text loses its tail, not the end (open_clip; CLIP raises).
        """
        if context_length < 2:
            raise ValueError(f"context_length {context_length} leaves no room for the start and the end")
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.sot, *self.encode(text)[:context_length - 2], self.eot] for text in texts]
        length = max(map(len, rows), default=0)
        rows = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), length)

    def encode(self, text):
        """A str -> list of int, without start and end. As in CLIP, "<|endoftext|>" in it is the end id."""
        ids = []
        for word in words(text):
            found = self.cache.get(word)
            if found is None:
                found = self._encode_word(word)
                # The web never runs out of new words (names, numbers, links), and each loader process has
                # its own cache (45 MB when full). Frequent words come early; the rest is merged each time.
                if len(self.cache) < CACHE_WORDS:
                    self.cache[word] = found
            ids += found
        return ids

    def _encode_word(self, word):
        ids = []
        for piece in PIECES.findall(word):
            symbols = symbols_of(piece)
            whole = "".join(symbols)
            symbols = [whole] if whole in self.ids else symbols  # merging would end there too, but later
            while len(symbols) > 1:
                best = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
                if best not in self.ranks:
                    break
                symbols = merge(symbols, best)
            ids += [self.ids[symbol] for symbol in symbols]
        return tuple(ids)

    def decode(self, ids):
        """Ids (list or 1-d tensor) -> the cleaned text, a space after each piece, and special ids by name.

        Padding reads "!", id 0: cut it off first. Half a character is U+FFFD, an unknown id a KeyError.
        """
        text = "".join(self.symbols[int(i)] for i in ids)
        return bytes(CHAR_TO_BYTE[c] for c in text).decode("utf-8", errors="replace").replace("</w>", " ")

    def save(self, path):
        """Writes a text file (UTF-8): a version line, then "left right" for each merge."""
        lines = [HEADER, *map(" ".join, self.merges)]
        write_atomically(Path(path), "".join(f"{line}\n" for line in lines).encode("utf-8"))

    @classmethod
    def load(cls, path):
        """The tokenizer that save wrote to path; ValueError for another kind of file."""
        header, *lines = Path(path).read_bytes().decode("utf-8", errors="replace").split("\n")
        if header != HEADER:
            raise ValueError(f"{path} was not written by Tokenizer.save: it does not start with {HEADER!r}")
        return cls(line.split(" ") for line in lines[:-1])

    @classmethod
    def clip(cls, path=None):
        """CLIP's vocabulary and [MASK], 49,409 ids, from CLIP's own file, which is not ours to keep here.

        The file is path, or the first found of $CLIP_VOCAB, the user's cache, an installed open_clip or clip;
        else pip fetches it. ValueError if its SHA-256 is wrong, FileNotFoundError with all places looked at.
        """
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache = Path(caches, "maskclip", CLIP_FILE)
        places = [Path(place) for place in (os.environ.get("CLIP_VOCAB"), cache) if place]
        for package in ("open_clip", "clip"):
            spec = importlib.util.find_spec(package)  # where it lies, without importing it
            places += [Path(folder, CLIP_FILE) for folder in spec and spec.submodule_search_locations or ()]
        found = Path(path) if path is not None else next((place for place in places if place.is_file()), None)
        packed = found.read_bytes() if found else _fetch_clip_file(places)
        digest = hashlib.sha256(packed).hexdigest()
        if digest != CLIP_SHA256:
            raise ValueError(f"{found or CLIP_WHEEL} is not CLIP's file: SHA-256 {digest}, not {CLIP_SHA256}")
        if not found:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, packed)
        lines = gzip.decompress(packed).decode("utf-8").split("\n")
        return cls(line.split(" ") for line in lines[1:1 + CLIP_MERGES])

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns merges from an iterable of str until len(tok) == vocab_size or no pair occurs twice.

        Next is the most frequent pair, and of equals the first in code point order, so neither the order of
        texts nor the hash seed matters. ValueError if vocab_size is below the 515 that every vocabulary has.
        """
        if vocab_size < FIXED:
            raise ValueError(f"vocab_size {vocab_size} is below {FIXED}: 512 for bytes, start, end, [MASK]")
        pieces = Counter()
        for word, n in Counter(word for text in texts for word in words(text)).items():
            for piece in PIECES.findall(word):
                pieces[piece] += n
        table = [(symbols_of(piece), n) for piece, n in pieces.items()]

        counts, holders = Counter(), defaultdict(set)  # pair -> occurrences; pair -> rows that may hold it
        for row, (symbols, n) in enumerate(table):
            for pair in pairwise(symbols):
                counts[pair] += n
                holders[pair].add(row)
        merges, heap = [], [(-n, pair) for pair, n in counts.items()]
        heapq.heapify(heap)
        while heap and len(merges) < vocab_size - FIXED:
            n, best = heapq.heappop(heap)
            if -n != counts[best]:  # other merges took some of it since: back to its true place
                heapq.heappush(heap, (-counts[best], best))
                continue
            if counts[best] < 2:
                break
            merges.append(best)
            symbol, fresh = "".join(best), set()
            for row in holders.pop(best):
                old, n = table[row]
                new = merge(old, best)
                table[row] = new, n
                for pair in pairwise(old):
                    counts[pair] -= n
                for pair in pairwise(new):
                    counts[pair] += n
                    if symbol in pair:  # no other pair can have grown
                        holders[pair].add(row)
                        fresh.add(pair)
            for pair in fresh:
                heapq.heappush(heap, (-counts[pair], pair))
        return cls(merges)


def _fetch_clip_file(places):
    """CLIP's file (bytes) out of open_clip's wheel; FileNotFoundError names the other places if pip fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", CLIP_WHEEL, "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FileNotFoundError(
                f"CLIP's vocabulary is not at {', '.join(map(str, places))}, not in an installed open_clip "
                f"or clip, and pip cannot download {CLIP_WHEEL} ({' '.join(done.stderr.split())[-200:]}): "
                f"set CLIP_VOCAB to a copy of {CLIP_FILE}, or connect to the internet")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(f"open_clip/{CLIP_FILE}")
