"""tokenizer.py against a naive trainer and encoder, the plain cleaning, and (peers) open_clip's tokenizer."""
import gzip
import hashlib
import html
import importlib.util
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path

import ftfy
import pytest
import regex
import torch

import tokenizer
from tokenizer import Tokenizer

NOUNS = "dog cat horse banana mississippi bookkeeper zoo aaa aaaa aaaaa umbrella photographer church"
OTHERS = "a the of on with red, it's they're dogs' 2023 no.1 naïve 東京 東京タワー 😀😀 ... !!! hahaha"
AWKWARD = [
    "", " \t\n ", "A Photo of a DOG'S café.", "it's THEY'VE i'll he'd don't 're ''s", "100% of $5 = #1!! a_b",
    "caf&eacute; &amp;amp; &lt;b&gt; &amp", "&amp;eacute; &amp;lt;i&amp;gt; &#x1F600; &#xD800; &#x85;",
    "beside a < ftfy leaves entities alone: &amp;eacute; &eacute;",
    "schÃ¶n fÃ¼r dâ€™accord â€œquotedâ€\x9d", "“curly” ‘quotes’ ﬁne ﬂow ＬＯＵＤ", "İstanbul ſmall 'ſ K Å ΑΣ",
    "bell\x07 esc\x1b[31mred\x1b[0m nul\x00 \x85 a\rb\x1cc\u2028d", "[MASK] </w> C:\\dir", "x" * 300,
    "😀👩‍👩‍👧🏽🇩🇪 ☕️", "東京タワーの写真、夜。", "صورة كلب في الحديقة", "ไทย हिन्दी עברית",
    "a\u0301 \ud83d lone surrogate \ud83d\ude00", "zero\u200bwidth\u3000wide\xa0", "٣ ² ½ Ⅷ",
    "ab" * 99, "word " * 500,
]
# OpenAI CLIP's pattern, copied.
PATTERN = regex.compile(
    r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
    regex.IGNORECASE)


def captions(n, seed=0):
    """Texts of a few common words and one made up of few letters, so that pairs tie, overlap and repeat."""
    rng = random.Random(seed)
    made_up = ["".join(rng.choices("aabnost", k=rng.randrange(1, 9))) for _ in range(n)]
    nouns, others = NOUNS.split(), OTHERS.split()
    return [" ".join([*rng.choices(nouns, k=3), word, *rng.choices(others, k=4)]) for word in made_up]


def noise(n, seed=0):
    """Short texts of random code points: ASCII with controls, Latin, the first plane, emoji, surrogates."""
    rng = random.Random(seed)
    ranges = [(0, 128), (32, 127), (128, 0x250), (0x250, 0x3000), (0x3000, 0x10000), (0x1F300, 0x1FA00)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(i % 30)) for i in range(n)]


def plain_clean(text):
    """CLIP's cleaning as its source has it, with no shortcut."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).strip().split()).lower()


def naive_pieces(text):
    """Pieces of a text as lists of starting symbols; GPT-2's byte table by another definition."""
    spare = iter(range(256, 512))
    table = [chr(i) if chr(i).isprintable() and i != 32 else chr(next(spare)) for i in range(256)]
    pieces = [[table[byte] for byte in piece.encode()] for piece in PATTERN.findall(plain_clean(text))]
    return [[*piece[:-1], piece[-1] + "</w>"] for piece in pieces]


def naive_merge(symbols, left, right):
    for i in range(len(symbols)):
        if symbols[i:i + 2] == [left, right]:
            symbols = [*symbols[:i], left + right, *symbols[i + 2:]]
    return symbols


def naive_train(texts, n_merges):
    """BPE by its definition: before each merge count the pairs of all pieces anew; ties by code points."""
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
    specials = ["<|endoftext|> <|startoftext|>"] * 500  # would be merged first if they counted as text
    assert Tokenizer.train([*texts, *specials], 515 + 120).merges == naive_train(texts, 120)
    complete = Tokenizer.train(texts[:8], 100_000)  # stops by itself: no pair is left twice
    assert complete.merges == naive_train(texts[:8], 100_000) and 515 < len(complete) < 800


def test_train_ignores_order_and_hash_seed(tok):
    texts = captions(300)
    assert Tokenizer.train(random.Random(1).sample(texts, 300), 715).merges == tok.merges
    code = ("import json, sys, tokenizer; "
            "json.dump(tokenizer.Tokenizer.train(json.load(sys.stdin), 715).merges, sys.stdout)")
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(tokenizer.__file__).parent)}
    out = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts).encode(), env=env, check=True,
                         stdout=subprocess.PIPE).stdout
    assert [tuple(pair) for pair in json.loads(out)] == tok.merges


def test_vocab_size(tok):
    assert len(tok) == 715 and len(Tokenizer.train(["aa aa"], 515)) == 515
    with pytest.raises(ValueError, match="514 .* 515"):
        Tokenizer.train(["aa aa"], 514)


def test_encode_equals_merging_rank_by_rank(tok):
    """Also on words not trained on. The naive encoder applies each merge to each piece, in order of rank."""
    for text in captions(50, seed=1) + AWKWARD + noise(300):
        pieces = naive_pieces(text)
        for pair in tok.merges:
            pieces = [naive_merge(piece, *pair) for piece in pieces]
        assert [tok.symbols[i] for i in tok.encode(text)] == [symbol for piece in pieces for symbol in piece]


def test_round_trip(tok):
    for text in captions(50, seed=2) + AWKWARD + noise(300, seed=1):
        assert tok.decode(tok.encode(text)).split() == PATTERN.findall(plain_clean(text)), text


def test_importing_takes_no_ftfy():
    """Clean captions do not need it, and each start would wait for it."""
    code = "import sys, train; print('ftfy' in sys.modules, train.data.Tokenizer.train(['a'], 515).encode('café'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.stdout.startswith("False [") and run.returncode == 0


def test_printable_ascii_needs_no_ftfy():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(40)))
        assert " ".join(tokenizer.words(text)) == plain_clean(text)


def test_cache_is_bounded_and_changes_nothing(tok, monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHE_WORDS", 3)
    small = Tokenizer(tok.merges)
    assert [small.encode(text) for text in captions(20)] == [tok.encode(text) for text in captions(20)]
    assert len(small.cache) == 3


def test_special_ids(tok):
    assert (tok.sot, tok.eot, tok.mask) == (712, 713, 714)
    assert tok.encode("a <|startoftext|>b<|EndOfText|>") == [*tok.encode("a"), 712, *tok.encode("b"), 713]
    assert tok.mask not in tok.encode("[MASK] [mask]")
    assert tok.decode([712, *tok.encode("dog"), 714, 713]) == "<|startoftext|>dog [MASK]<|endoftext|>"
    assert tok.decode(torch.tensor([0, 0])) == "!!"
    for unknown in (-1, 715):
        with pytest.raises(KeyError):
            tok.decode([unknown])


def test_rows(tok):
    short, long = tok.encode("dog"), tok.encode("a horse on a banana")
    assert len(short) + 1 < len(long)
    rows = tok(["dog", "a horse on a banana", ""])
    assert rows.dtype == torch.long and rows.shape == (3, len(long) + 2)
    assert rows[0].tolist() == [712, *short, 713] + [0] * (len(long) - len(short))
    assert rows[1].tolist() == [712, *long, 713] and rows[2, :3].tolist() == [712, 713, 0]
    cut = tok(["a horse on a banana", "dog"], context_length=5)
    assert cut[0].tolist() == [712, *long[:3], 713]
    assert tok("dog", context_length=len(short) + 2).tolist() == tok(["dog"]).tolist() == [[712, *short, 713]]
    assert tok("word " * 500).shape == (1, 77) and tok([]).shape == (0, 0)
    with pytest.raises(ValueError, match="context_length 1 "):
        tok("dog", context_length=1)


def test_save_and_load(tok, tmp_path, monkeypatch):
    path = tmp_path / "bpe.txt"
    tok.save(path)
    again = Tokenizer.load(str(path))
    assert again.merges == tok.merges and again.ids == tok.ids
    Tokenizer([("a", "b"), ("ab", "c</w>")]).save(path)
    assert path.read_text(encoding="utf-8") == "#maskclip bpe 1\na b\nab c</w>\n"
    assert Tokenizer.load(path).encode("abc") == [513]
    with monkeypatch.context() as patch:  # stopped before the end, save leaves the old file whole
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            tok.save(path)
    assert len(Tokenizer.load(path)) == 517
    for wrong in (b"", b"a b\n", b"\x1f\x8b\xff"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="bpe.txt was not written by Tokenizer.save"):
            Tokenizer.load(path)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without CLIP's file: none in the cache or in the installed open_clip and clip, and pip fails.

    CLIP's file is here a small one of five lines, three of them merges in use.
    """
    packed = gzip.compress(b"#version\na b\nab c</w>\nx y\nx z\nnot a pair\n", mtime=0)
    monkeypatch.setattr(tokenizer, "CLIP_SHA256", hashlib.sha256(packed).hexdigest())
    monkeypatch.setattr(tokenizer, "CLIP_MERGES", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIP_VOCAB", str(tmp_path / "env.gz"))

    def find_spec(name):
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route\nto the index")

    monkeypatch.setattr(subprocess, "run", run)
    places = {"env": tmp_path / "env.gz", "cache": tmp_path / "cache/maskclip/bpe_simple_vocab_16e6.txt.gz"}
    places |= {name: tmp_path / name / "bpe_simple_vocab_16e6.txt.gz" for name in ("open_clip", "clip")}
    return packed, places, calls


def test_clip_missing_everywhere(bare, tmp_path, monkeypatch):
    _, places, calls = bare
    with pytest.raises(FileNotFoundError) as caught:
        Tokenizer.clip()
    for named in (*places.values(), "open_clip_torch==3.3.0", "no route to the index", "set CLIP_VOCAB"):
        assert str(named) in str(caught.value)
    assert len(calls) == 1 and calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    with pytest.raises(FileNotFoundError, match="nowhere.gz"):  # a path of one's own: no search
        Tokenizer.clip(tmp_path / "nowhere.gz")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # nothing installed
    with pytest.raises(FileNotFoundError, match="open_clip or clip"):
        Tokenizer.clip()
    assert len(calls) == 2


def test_clip_takes_the_first_place_and_checks_it(bare, tmp_path):
    packed, places, calls = bare
    for name in ("clip", "open_clip", "cache", "env"):  # from the last place to the first
        places[name].parent.mkdir(parents=True, exist_ok=True)
        places[name].write_bytes(packed)
        found = Tokenizer.clip()
        assert found.merges == [("a", "b"), ("ab", "c</w>"), ("x", "y")] and len(found) == 518
        places[name].write_bytes(packed + b"\0")
        with pytest.raises(ValueError, match=regex.escape(str(places[name]))):
            Tokenizer.clip()
    own = tmp_path / "own.gz"
    own.write_bytes(packed)
    assert len(Tokenizer.clip(own)) == len(Tokenizer.clip(str(own))) == 518 and not calls
    own.write_bytes(packed[:-1])
    with pytest.raises(ValueError, match="own.gz"):
        Tokenizer.clip(own)


def test_clip_is_fetched_once(bare, monkeypatch):
    packed, places, _ = bare
    contents = [packed[:-1], packed]

    def run(command, **_):
        folder = command[command.index("-d") + 1]
        with zipfile.ZipFile(Path(folder, "open_clip_torch-3.3.0-py3-none-any.whl"), "w") as wheel:
            wheel.writestr("open_clip/bpe_simple_vocab_16e6.txt.gz", contents.pop(0))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ValueError, match="open_clip_torch==3.3.0"):  # and what is wrong is not kept
        Tokenizer.clip()
    assert not places["cache"].exists()
    assert len(Tokenizer.clip()) == len(Tokenizer.clip()) == 518 and not contents
    assert [file.name for file in places["cache"].parent.iterdir()] == [places["cache"].name]


@pytest.fixture(scope="module")
def both():
    peer = pytest.importorskip("open_clip.tokenizer")
    return Tokenizer.clip(peer.default_bpe()), peer.SimpleTokenizer()


@pytest.mark.peers
def test_clip_vocabulary_is_open_clips(both):
    ours, peer = both
    assert (len(ours), ours.sot, ours.eot, ours.mask) == (49409, peer.sot_token_id, peer.eot_token_id, 49408)
    assert all(ours.symbols[i] == peer.decoder[i] for i in range(ours.sot))
    assert ours.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]


@pytest.mark.peers
def test_clip_ids_are_open_clips(both):
    """For every word of the vocabulary, captions with words that are not in it, awkward texts, and noise."""
    ours, peer = both
    vocabulary = [peer.decode([i]).strip() for i in range(256, peer.sot_token_id)]
    texts = [" ".join(vocabulary[i:i + 40]) for i in range(0, len(vocabulary), 40)]
    texts += AWKWARD + captions(1000) + noise(3000) + [" ".join(noise(40, seed)) for seed in range(1, 30)]
    for text in texts:
        ids = peer.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == peer.decode(ids), text


@pytest.mark.peers
def test_clip_rows_are_open_clips(both):
    ours, peer = both
    texts = AWKWARD + captions(200) + [" ".join(captions(k, seed=k)) for k in range(1, 12)]
    for length in (77, 16, 2):
        rows = ours(texts, context_length=length)
        padded = torch.nn.functional.pad(rows, (0, length - rows.shape[1]))
        assert torch.equal(padded, peer(texts, context_length=length))
    assert (ours(texts)[:, -1] == ours.eot).any()  # some were truncated
