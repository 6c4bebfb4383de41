"""Byte-level BPE for captions: CLIP's tokenizer to the id, or one learned from your own captions.

Paper: section 3 (CLIP's vocabulary, context 77).  Ideas: BPE (Sennrich et al. 2016), GPT-2's byte
table, OpenAI's CLIP (simple_tokenizer.py).

    tokenizer = Tokenizer.clip()                            # CLIP's 49,408 ids, and [MASK]
    tokenizer = Tokenizer.train(captions, vocab_size=8192)  # .save(path), Tokenizer.load(path)
    tokenizer(["a photo of a dog"])                         # LongTensor (1, 7): start, 5 words, end
"""
import gzip
import hashlib
import heapq
import html
import math
import os
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch

SOT, EOT, MASK = "<|startoftext|>", "<|endoftext|>", "[MASK]"
PIECES = regex.compile(  # CLIP; "<|endoftext|>" in a caption is text (open_clip), not a token
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# GPT-2's table: each byte as a printable character, in the order that gives CLIP's first 256 ids.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE}
BYTE_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
FIXED = 2 * 256 + 3                     # in every vocabulary: bytes, bytes that end a word, SOT ...
HEADER = "#maskclip bpe 1"              # first line of a saved vocabulary
CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_MERGES = 49152 - 256 - 2           # CLIP uses only these of the file's 262,144 merges
CACHE_WORDS = 2**18                     # our choice: 45 MB in each loader process
TEXT_LIMIT = 4000                       # our choice: characters of a text that are read


def words(text):
    """CLIP's cleaning of a str (mojibake, HTML entities, lower case, white space) -> its words."""
    # ftfy and html.unescape change nothing in printable ASCII without "&".
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower().split()


def byte_symbols(piece):
    """The symbols that a piece starts from: one a byte, the last with the mark of a word's end."""
    symbols = [BYTE_TO_CHAR[byte] for byte in piece.encode("utf-8")]
    symbols[-1] += "</w>"
    return symbols


def merge(symbols, pair):
    """The list of symbols, in which each occurrence of the pair, from the left, is one symbol."""
    merged = symbols[:1]
    for symbol in symbols[1:]:
        if (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


class Tokenizer:
    """A vocabulary and its use.  len() counts all ids; .sot, .eot and .mask are the last three.

    .merges, a list of (left, right) pairs of str, holds it all: Tokenizer(merges) gives equal ids.
    """

    def __init__(self, merges):
        self.merges = [(left, right) for left, right in merges]
        chars = list(BYTE_TO_CHAR.values())
        ends = [char + "</w>" for char in chars]
        merged = [left + right for left, right in self.merges]
        self.symbols = dict(enumerate([*chars, *ends, *merged, SOT, EOT, MASK]))
        self.ids = {symbol: i for i, symbol in self.symbols.items()}
        self.sot, self.eot, self.mask = self.ids[SOT], self.ids[EOT], self.ids[MASK]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.cache = {}  # word -> tuple of ids

    def __len__(self):
        return len(self.symbols)

    def __call__(self, texts, context_length=77):
        """A str or a list of B str -> LongTensor (B, L), L = longest row <= context_length (CLIP).

        A row is start, ids, end, then 0s.  A longer text loses its tail, but never the end; of what
        it loses, most is not even read, because one word of 100,000 letters takes half a minute.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = [self.encode(text[:TEXT_LIMIT])[:context_length - 2] for text in texts]
        rows = [[self.sot, *row, self.eot] for row in rows]
        length = max(map(len, rows), default=0)
        padded = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).view(len(rows), length)

    def encode(self, text):
        """A str -> list of ids, no start, no end."""
        ids = []
        for word in words(text):
            encoded = self.cache.get(word)
            if encoded is None:
                encoded = self.encode_word(word)
                # Frequent words come early, but the web never runs out of new ones.
                if len(self.cache) < CACHE_WORDS:
                    self.cache[word] = encoded
            ids += encoded
        return ids

    def encode_word(self, word):
        """A cleaned word -> tuple of ids."""
        ids = []
        for piece in PIECES.findall(word):
            symbols = byte_symbols(piece)
            while len(symbols) > 1:  # the merge that was learned first comes first
                best = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, math.inf))
                if best not in self.ranks:
                    break
                symbols = merge(symbols, best)
            ids += [self.ids[symbol] for symbol in symbols]
        return tuple(ids)

    def decode(self, ids):
        """Ids (list or 1-d tensor) -> the cleaned text, a space after each piece, specials by name.

        Padding reads "!", which is id 0: cut it off first.  KeyError for an unknown id.
        """
        text = "".join(self.symbols[int(i)] for i in ids)
        content = bytes(CHAR_TO_BYTE[char] for char in text)
        return content.decode("utf-8", errors="replace").replace("</w>", " ")

    def save(self, path):
        """Write a text file (UTF-8): a version line, then "left right" for each merge."""
        lines = [HEADER] + [f"{left} {right}" for left, right in self.merges]
        Path(path).write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))

    @classmethod
    def load(cls, path):
        """The tokenizer that save() wrote.  ValueError for another kind of file."""
        lines = Path(path).read_bytes().decode("utf-8", errors="replace").split("\n")
        if lines[0] != HEADER or lines[-1]:
            raise ValueError(f"{path} is not a vocabulary that Tokenizer.save wrote")
        return cls(line.split(" ") for line in lines[1:-1])

    @classmethod
    def clip(cls, path=None):
        """CLIP's vocabulary and [MASK], 49,409 ids, from CLIP's own file; it is not ours to copy.

        path, else $CLIP_VOCAB, else that of an installed open_clip or clip (nothing is imported).
        FileNotFoundError if it is nowhere, ValueError for another file.
        """
        installed = [Path(folder, package, CLIP_FILE)
                     for folder in sys.path for package in ("open_clip", "clip")]
        paths = [path, os.environ.get("CLIP_VOCAB"), *filter(Path.is_file, installed)]
        paths = [path for path in paths if path]
        if not paths:
            raise FileNotFoundError("CLIP's vocabulary is not on this machine: run `pip install "
                                    "--no-deps open_clip_torch`, which brings it, or set "
                                    f"CLIP_VOCAB to the path of a {CLIP_FILE}")
        path = paths[0]
        packed = Path(path).read_bytes()
        if hashlib.sha256(packed).hexdigest() != CLIP_SHA256:
            raise ValueError(f"{path} is not CLIP's {CLIP_FILE}: its SHA-256 is another one")
        lines = gzip.decompress(packed).decode("utf-8").split("\n")
        return cls(line.split(" ") for line in lines[1:1 + CLIP_MERGES])

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from an iterable of str until len() is vocab_size or no pair occurs twice.

        The most frequent pair comes next; of equals the first in code point order, so neither the
        order of the texts nor the hash seed matters.  ValueError for a vocab_size below 515.
        """
        if vocab_size < FIXED:
            raise ValueError(f"vocab_size {vocab_size} is below {FIXED}: 512 for bytes, 3 specials")
        pieces = Counter()
        for word, n in Counter(w for text in texts for w in words(text[:TEXT_LIMIT])).items():
            for piece in PIECES.findall(word):
                pieces[piece] += n
        table = [(byte_symbols(piece), n) for piece, n in pieces.items()]

        # The counts of pairs are kept up to date, because to recount them takes minutes.
        counts, holders = Counter(), defaultdict(set)  # pair -> occurrences; rows that may hold it
        for row, (symbols, n) in enumerate(table):
            for pair in pairwise(symbols):
                counts[pair] += n
                holders[pair].add(row)
        merges, heap = [], [(-n, pair) for pair, n in counts.items()]
        heapq.heapify(heap)
        while heap and len(merges) < vocab_size - FIXED:
            n, best = heapq.heappop(heap)
            if -n != counts[best]:  # other merges took some of it since: back to where it belongs
                heapq.heappush(heap, (-counts[best], best))
                continue
            if counts[best] < 2:
                break
            merges.append(best)
            symbol, grown = "".join(best), set()
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
                        grown.add(pair)
            for pair in grown:
                heapq.heappush(heap, (-counts[pair], pair))
        return cls(merges)
