"""tokenizer.py against a naive trainer and encoder, the plain cleaning, and (peers) open_clip's."""
import gzip
import hashlib
import html
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import ftfy
import pytest
import regex
import torch
from helpers import ROOT

import tokenizer
from tokenizer import Tokenizer

WORDS = """dog cat horse banana mississippi bookkeeper zoo aaa aaaa aaaaa umbrella photographer a
    the of red, it's they're dogs' 2023 no.1 naïve 東京 東京タワー 😀😀 ... !!! hahaha""".split()
AWKWARD = [
    "", " \t\n ", "A Photo of a DOG'S café.", "it's THEY'VE i'll he'd don't 're ''s",
    "100% of $5 = #1!! a_b", "caf&eacute; &amp;amp; &lt;b&gt; &amp",
    "&amp;eacute; &amp;lt;i&amp;gt; &#x1F600; &#xD800; &#x85;",
    "after a < ftfy leaves entities alone: &amp;eacute; &eacute;",
    "schÃ¶n fÃ¼r dâ€™accord â€œquotedâ€\x9d", "“curly” ‘quotes’ ﬁne ﬂow ＬＯＵＤ",
    "İstanbul ſmall 'ſ K Å ΑΣ", "bell\x07 esc\x1b[31mred\x1b[0m nul\x00 \x85 a\rb\x1cc\u2028d",
    "[MASK] </w> C:\\dir <|endoftext|> b", "x" * 300, "😀👩‍👩‍👧🏽🇩🇪 ☕️", "東京タワーの写真、夜。",
    "صورة كلب في الحديقة", "ไทย हिन्दी עברית", "a\u0301 \ud83d lone surrogate \ud83d\ude00",
    "zero\u200bwidth\u3000wide\xa0", "٣ ² ½ Ⅷ", "ab" * 99, "word " * 500,
]
PATTERN = regex.compile(  # OpenAI CLIP's, copied, but for the special tokens
    r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""", regex.IGNORECASE)


def captions(n, seed=0):
    """A few common words and one of few letters, so that pairs tie, overlap and repeat."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        made_up = "".join(rng.choices("aabnost", k=rng.randrange(1, 9)))
        texts.append(" ".join([*rng.choices(WORDS, k=7), made_up]))
    return texts


def noise(n, seed=0):
    """Random code points: ASCII with controls, Latin, the first plane, emoji, surrogates."""
    rng = random.Random(seed)
    ranges = [(0, 128), (32, 127), (128, 0x250), (0x250, 0x3000), (0x3000, 0x10000),
              (0x1F300, 0x1FA00)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(i % 30))
            for i in range(n)]


def plain_clean(text):
    """CLIP's cleaning as its source has it, with no shortcut."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.strip().split()).lower()


def naive_pieces(text):
    """Pieces of a text as lists of symbols; GPT-2's byte table by another definition."""
    spare = iter(range(256, 512))
    table = [chr(i) if chr(i).isprintable() and i != 32 else chr(next(spare)) for i in range(256)]
    pieces = [[table[byte] for byte in piece.encode()]
              for piece in PATTERN.findall(plain_clean(text))]
    return [[*piece[:-1], piece[-1] + "</w>"] for piece in pieces]


def naive_merge(symbols, left, right):
    for i in range(len(symbols)):
        if symbols[i:i + 2] == [left, right]:
            symbols = [*symbols[:i], left + right, *symbols[i + 2:]]
    return symbols


def naive_train(texts, n_merges):
    """BPE by its definition: before each merge count all pairs anew; ties by code points."""
    corpus, merges = [piece for text in texts for piece in naive_pieces(text)], []
    while len(merges) < n_merges:
        counts = Counter(pair for piece in corpus for pair in pairwise(piece))
        n, best = min(((-n, pair) for pair, n in counts.items()), default=(0, None))
        if n > -2:
            break
        merges.append(best)
        corpus = [naive_merge(piece, *best) for piece in corpus]
    return merges


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(captions(300), 715)


def test_train_equals_naive_recount():
    texts = captions(60)
    trained = Tokenizer.train(texts, 515 + 100)
    assert trained.merges == naive_train(texts, 100)
    complete = Tokenizer.train(texts[:8], 100_000)  # stops by itself: no pair is left twice
    assert complete.merges == naive_train(texts[:8], 100_000)
    assert len(trained) == 615 and len(Tokenizer.train(["aa aa"], 515)) == 515
    with pytest.raises(ValueError, match="514"):
        Tokenizer.train(["aa aa"], 514)


@pytest.mark.slow
def test_train_ignores_order_and_hash_seed(tok):
    texts = captions(300)
    assert Tokenizer.train(random.Random(1).sample(texts, 300), 715).merges == tok.merges
    code = ("import json, sys; from tokenizer import Tokenizer;"
            "print(json.dumps(Tokenizer.train(json.load(sys.stdin), 715).merges))")
    run = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts).encode(), cwd=ROOT,
                         env=os.environ | dict(PYTHONHASHSEED="7"), check=True, capture_output=True)
    assert [tuple(pair) for pair in json.loads(run.stdout)] == tok.merges


def test_encode_equals_merging_rank_by_rank(tok):
    """Also for words not trained on: each merge applied to each piece, in order of rank."""
    for text in captions(30, seed=1) + AWKWARD + noise(150):
        pieces = naive_pieces(text)
        for pair in tok.merges:
            pieces = [naive_merge(piece, *pair) for piece in pieces]
        expected = [symbol for piece in pieces for symbol in piece]
        assert [tok.symbols[i] for i in tok.encode(text)] == expected


def test_round_trip_and_cleaning(tok):
    for text in captions(50, seed=2) + AWKWARD + noise(300, seed=1):
        assert " ".join(tokenizer.words(text)) == plain_clean(text)
        assert tok.decode(tok.encode(text)).split() == PATTERN.findall(plain_clean(text)), text


def test_cache_is_bounded_and_changes_nothing(tok, monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHE_WORDS", 3)
    small = Tokenizer(tok.merges)
    for _ in range(2):
        assert [small.encode(text) for text in captions(20)] == list(map(tok.encode, captions(20)))
    assert len(small.cache) == 3


def test_special_ids(tok):
    assert (tok.sot, tok.eot, tok.mask) == (712, 713, 714)
    written = tok.encode("a <|startoftext|>b<|EndOfText|> [MASK]")  # text, as in open_clip
    assert max(written) < 712
    assert tok.decode(written).split() == "a <| startoftext |> b <| endoftext |> [ mask ]".split()
    text = tok.decode([712, *tok.encode("dog"), 714, 713])
    assert text == "<|startoftext|>dog [MASK]<|endoftext|>"
    assert tok.decode(torch.tensor([0, 0])) == "!!"
    for unknown in (-1, 715):
        with pytest.raises(KeyError):
            tok.decode([unknown])


def test_a_huge_text_is_not_read_to_its_end(tok, monkeypatch):
    letters = "".join(random.Random(0).choices("abnost", k=1000))
    whole = tok(letters * 3)
    monkeypatch.setattr(tokenizer, "TEXT_LIMIT", 3000)
    fresh = Tokenizer(tok.merges)
    assert torch.equal(fresh(letters * 300), whole) and max(map(len, fresh.cache)) == 3000
    monkeypatch.setattr(tokenizer, "TEXT_LIMIT", 4)
    assert Tokenizer.train(["aaaa bcbcbcbc"], 600).merges == [("a", "a")]


def test_rows(tok):
    short, long = tok.encode("dog"), tok.encode("a horse on a banana")
    assert len(short) + 1 < len(long)
    rows = tok(["dog", "a horse on a banana", ""])
    assert rows.dtype == torch.long
    assert rows[0].tolist() == [712, *short, 713] + [0] * (len(long) - len(short))
    assert rows[1].tolist() == [712, *long, 713]
    assert rows[2, :3].tolist() == [712, 713, 0]
    assert tok("a horse on a banana", context_length=5).tolist() == [[712, *long[:3], 713]]
    assert tok("dog", context_length=len(short) + 2).tolist() == [[712, *short, 713]]
    assert tok("word " * 500).shape == (1, 77)


def test_save_and_load(tok, tmp_path):
    path = tmp_path / "bpe.txt"
    tok.save(path)
    again = Tokenizer.load(str(path))
    assert again.merges == tok.merges and again.ids == tok.ids
    Tokenizer([("a", "b"), ("ab", "c</w>")]).save(path)
    assert path.read_text(encoding="utf-8") == "#maskclip bpe 1\na b\nab c</w>\n"
    assert Tokenizer.load(path).encode("abc") == [513]
    for wrong in (b"", b"a b\n", b"\x1f\x8b\xff", b"#maskclip bpe 1\na b\nab c"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="bpe.txt"):
            Tokenizer.load(path)


def test_clips_file_is_found_and_checked(tmp_path, monkeypatch):
    """A small file stands for CLIP's: of its merges three are used."""
    packed = gzip.compress(b"#version\na b\nab c</w>\nx y\nx z\nnot a pair\n", mtime=0)
    monkeypatch.setattr(tokenizer, "CLIP_SHA256", hashlib.sha256(packed).hexdigest())
    monkeypatch.setattr(tokenizer, "CLIP_MERGES", 3)
    monkeypatch.setattr(tokenizer, "CLIP_FILE", "vocabulary.gz")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("CLIP_VOCAB", raising=False)
    with pytest.raises(FileNotFoundError, match="pip install"):
        Tokenizer.clip()
    installed = tmp_path / "clip/vocabulary.gz"
    installed.parent.mkdir()
    installed.write_bytes(packed)
    assert Tokenizer.clip().merges == [("a", "b"), ("ab", "c</w>"), ("x", "y")]
    monkeypatch.setenv("CLIP_VOCAB", str(tmp_path / "env.gz"))  # goes before what is installed
    (tmp_path / "env.gz").write_bytes(packed + b"\0")
    with pytest.raises(ValueError, match="env.gz"):
        Tokenizer.clip()
    assert len(Tokenizer.clip(installed)) == 518  # a path goes before all


@pytest.fixture(scope="module")
def both():
    peer = pytest.importorskip("open_clip.tokenizer")
    return Tokenizer.clip(), peer.SimpleTokenizer()


@pytest.mark.peers
def test_clip_vocabulary_is_open_clips(both):
    ours, peer = both
    assert (len(ours), ours.sot, ours.eot) == (49409, peer.sot_token_id, peer.eot_token_id)
    assert ours.mask == 49408
    assert all(ours.symbols[i] == peer.decoder[i] for i in range(ours.sot))
    assert ours.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]


@pytest.mark.peers
def test_clip_ids_and_rows_are_open_clips(both):
    """For each word of the vocabulary, unknown words, awkward texts, noise, and long texts."""
    ours, peer = both
    vocabulary = [peer.decode([i]).strip() for i in range(256, peer.sot_token_id)]
    texts = [" ".join(vocabulary[i:i + 40]) for i in range(0, len(vocabulary), 40)]
    texts += AWKWARD + captions(1000) + noise(3000)
    texts += [" ".join(noise(40, seed)) for seed in range(1, 30)]
    for text in texts:
        ids = peer.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == peer.decode(ids), text
    for length in (77, 16, 2):
        rows = ours(texts, context_length=length)
        padded = torch.nn.functional.pad(rows, (0, length - rows.shape[1]))
        assert torch.equal(padded, peer(texts, context_length=length))
