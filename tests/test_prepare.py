"""Any source becomes shards once: what is bad is counted and named, and a stop is resumed."""
import bz2
import csv
import json
import os
import pickle
import signal
import time
import zipfile

import numpy as np
import pytest
from helpers import finish, picture_bytes, start, write_shard
from PIL import Image

import data
from support import runtime, shards
from tools import prepare, readers


@pytest.fixture
def run(capfd):
    """The command line.  -> what it prints"""
    def call(*arguments, fails=False):
        with pytest.raises(SystemExit) as end:
            prepare.main(list(map(str, arguments)))
        assert bool(end.value.code) == fails
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return printed.out + printed.err
    return call


@pytest.fixture
def packed(run, tmp_path):
    """Pack and read back.  -> [(width of the picture - 10, captions)], what was printed"""
    def call(*arguments):
        out = tmp_path / f"packed{len(list(tmp_path.glob('packed*')))}"
        printed = run("pack", *arguments, "--out", out)
        return contents(out), printed
    return call


def contents(folder):
    """[(width of the picture - 10, captions)] of shards."""
    pairs = data.Pairs([str(folder)])
    assert not pairs.warnings
    return [(data.decode(content).width - 10, captions)
            for content, captions in (pairs[i] for i in range(len(pairs)))]


def picture(number, kind="JPEG"):
    """A picture that can be recognised by its width."""
    return picture_bytes((90, 30, 200), (10 + number, 30), kind)


def members(numbers, suffix="jpg", content=None):
    """Pairs for a shard: a picture that can be recognised, or `content`, and a caption."""
    for i in numbers:
        yield f"{i}.{suffix}", content or picture(i)
        yield f"{i}.txt", b"some text"


def draw_pictures(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(picture(number))


NOISE = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
TRUNCATED = picture_bytes(NOISE, kind="JPEG")[:-2000]


def write_table(path, rows, columns=("image", "title", "description")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(columns, row))) + "\n" for row in rows)
        elif path.suffix == ".tsv":
            file.writelines("\t".join(row) + "\n" for row in [columns, *rows])
        else:
            csv.writer(file).writerows([columns, *rows])
    return path


# ---------------------------------------------------------------- sources

@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables(tmp_path, packed, suffix):
    """Quotes, commas, line ends, a missing picture; and more records than are looked at first."""
    draw_pictures(tmp_path / "images", (0, 2, 3))
    titles = ['say "cheese", please', "gone", "" if suffix == ".tsv" else 'two\n"lines"', "größe"]
    rows = [(f"{i}.jpg", title, f"number {i}") for i, title in enumerate(titles)]
    rows += [("0.jpg", f"title {i}", "") for i in range(150)]
    found, printed = packed(write_table(tmp_path / f"table{suffix}", rows))
    assert found[:3] == [(i, [text for text in (titles[i], f"number {i}") if text])
                         for i in (0, 2, 3)]
    assert found[3:] == [(0, [f"title {i}"]) for i in range(150)]
    assert "packed 153 pairs" in printed and "record 2: " in printed


def test_odd_records_are_left_out_and_spare_the_others(tmp_path, packed):
    """Blank lines, byte-order marks, Windows' line ends, lines that are cut off, wrong types."""
    draw_pictures(tmp_path, [0])
    good = dict(image="0.jpg", caption="good")
    odd = [dict(caption=7), dict(image=["a"]), dict(image="x" * 300), dict(image="a\0b"),
           dict(image="a.zip/0.jpg"), {"caption": "", "class": 3}]
    lines = [json.dumps(good), "", "{", "[1]", *(json.dumps(good | change) for change in odd),
             json.dumps(good | dict(url="http://a/b.zip/0.jpg"))]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found, printed = packed(tmp_path / "a.jsonl")
    assert found == [(0, ["good"])] * 2 and "left out 8 records" in printed
    assert printed.count("left out:") == 8

    rows = ['0.jpg,a 5" disk', "", '0.jpg,"two\r\nlines"', "0.jpg,end"]
    (tmp_path / "b.csv").write_bytes(("image,caption\r\n" + "\r\n".join(rows)).encode())
    found, _ = packed(tmp_path / "b.csv")
    assert [captions[0] for _, captions in found] == ['a 5" disk', "two\r\nlines", "end"]
    long = "long" * 50_000
    rows = ["image\tcaption", "", "0.jpg\to\rne", "", f"0.jpg\t{long}", "0.jpg\ttwo", ""]
    (tmp_path / "c.tsv").write_bytes("\r\n".join(rows).encode())
    assert packed(tmp_path / "c.tsv")[0] == [(0, ["o\rne"]), (0, [long]), (0, ["two"])]


@pytest.mark.parametrize("name,content,word", [
    ("c.csv", "photo,caption\n0.jpg,x\n", "'photo'"), ("t.csv", "image\tcaption\n", ".tsv"),
    ("d.tsv", "image\ttitle\nnowhere.jpg\tx\n", "nowhere.jpg"), ("k.pkl", "(lp0", "k.pkl"),
    ("e.csv", 'image,title\n0.jpg,"never closed' + " and on" * 200_000, "limit"),
    ("j.json", '{"images": [], "annotations": [{}]}', "image_id"), ("g.tsv", "", "none"),
    ("q.csv", 'image,caption\n0.jpg,a\n1.jpg,"b\n2.jpg,c\n', "line 3"),
    ("r.csv", "image,caption,caption\n0.jpg,a,b\n", "twice"),
    ("s.tsv", "image\tcaption\tcaption\n0.jpg\ta\tb\n", "twice"),
    ("u.csv", "image,sentence\n0.jpg,a\n", "'sentence'"),
    ("v.json", '{"annotations": [], "images": [{"id": 1, "file_name": "0.jpg"}, {"id": 1, '
     '"file_name": "0.jpg"}]}', "one id")])
def test_wrong_tables_are_one_sentence(tmp_path, run, name, content, word):
    draw_pictures(tmp_path, [0])
    (tmp_path / name).write_text(content)
    assert word in run("pack", tmp_path / name, "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name,lines,kept,said", [
    ("a.csv", b'image,caption\n0.jpg,a dog, a cat\n1.jpg,"b, c"\n', ["b, c"], "more cells"),
    ("a.tsv", b"image\tcaption\n0.jpg\ta\tb\n1.jpg\tc\n", ["c"], "more cells"),
    ("a.csv", b"image,caption\n0.jpg,caf\xe9\n1.jpg,caf\xc3\xa9\n", ["café"], "utf-8"),
    ("a.jsonl", b'{"image": "0.jpg", "captions": ["a", "\\ud800"]}\n'
     b'{"image": "1.jpg", "caption": "b"}\n', ["b"], "surrogate"),
    ("a.jsonl", b'{"image": "0.jpg", "caption": "\\ud800"}\n{"image": "1.jpg", "text": "b"}', ["b"],
     "surrogate"),
    ("a.jsonl", b'{"image": "0.jpg", "captions": ["a", 7]}\n{"image": "1.jpg", "caption": "b"}\n',
     ["b"], "no text"),
    ("a.json", json.dumps(dict(images=[dict(id=5, file_name="1.jpg")], annotations=[
        dict(image_id=5, caption="b"), dict(image_id=6, caption="c")])).encode(), ["b"], ""),
    ("a.tsv", b'image\tcaption\n0.jpg\t"a ""big"" dog"\n1.jpg\t"two" words"\n',
     ['a "big" dog', '"two" words"'], "")])
def test_rows_that_would_be_changed_are_counted(tmp_path, packed, name, lines, kept, said):
    draw_pictures(tmp_path, [0, 1])
    (tmp_path / name).write_bytes(lines)
    found, printed = packed(tmp_path / name)
    assert [captions for _, captions in found] == [[caption] for caption in kept]
    assert said in printed and f"left out {2 - len(kept)} records" in printed


@pytest.mark.parametrize("files,kept", [
    ({"00000/1.txt": "one", "00000/1.json": '{"caption": "x"}',
      "00000/2.json": '{"caption": "two"}', "00001/3.txt": "",
      "00001/3.json": '{"caption": "three"}', "00000_stats.json": "{}", "00000/.a.jpg": ""},
     {1: ["one"], 2: ["two"], 3: ["three"]}),  # img2dataset's files
    ({"captions.txt": 'image,caption\n1.jpg,a\n1.jpg,"b, c"\n2.jpg,d\n'},  # Flickr8k from Kaggle
     {1: ["a", "b, c"], 2: ["d"]}),
    ({"results.token": "1.jpg#0\ta\n1.jpg#1\tb\n3.jpg#0\tc\n"}, {1: ["a", "b"], 3: ["c"]}),
    ({"annotations/captions_val2017.json": json.dumps(dict(
        images=[dict(id=5, file_name="2.jpg")], annotations=[dict(image_id=5, caption="d")])),
      "annotations/instances_val2017.json": "{}"}, {2: ["d"]}),
    ({"TRAIN.CSV": "image,caption\n1.jpg,a\n"}, {1: ["a"]})])
def test_folders_of_a_known_form(tmp_path, packed, files, kept):
    homes = {"00000/1.txt": ("00000", "00001"), "captions.txt": ["Images"],
             "results.token": ["flickr30k-images"], "TRAIN.CSV": ["images"]}
    for home in homes.get(next(iter(files)), ["val2017"]):
        draw_pictures(tmp_path / "set" / home, {"00000": [1, 2], "00001": [3]}.get(home, [1, 2, 3]))
    for name, text in files.items():
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text(text)
    found, _ = packed(tmp_path / "set")
    assert dict(found) == kept and len(found) == len(kept)


def test_files_of_a_folder_that_are_left_out_are_counted(tmp_path, packed, run):
    """A mask next to a picture, a text without one, a picture without a text."""
    draw_pictures(tmp_path / "set", range(3))
    for i in (0, 1, 5):
        (tmp_path / f"set/{i}.txt").write_text(f"text {i}")
    (tmp_path / "set/1.png").write_bytes(picture(9, "PNG"))
    (tmp_path / "set/latest").symlink_to(tmp_path / "set")
    found, printed = packed(tmp_path / "set")
    assert found == [(0, ["text 0"])] and "left out 3 records" in printed
    assert "lies in the folder" in run("pack", tmp_path / "set", "--out", tmp_path / "set/out",
                                       fails=True)
    (tmp_path / "set/0.txt").write_text("new text")
    answer = run("pack", tmp_path / "set", "--out", tmp_path / "packed0", fails=True)
    assert "another --out" in answer  # the source has changed
    write_table(tmp_path / "set/captions.csv", [("1.jpg", "a", "")])
    answer = run("pack", tmp_path / "set", "--out", tmp_path / "new", fails=True)
    assert "captions.csv" in answer


def test_a_pack_that_ended_says_what_it_left_out(tmp_path, run):
    draw_pictures(tmp_path, [0])
    table = write_table(tmp_path / "a.csv", [("0.jpg", "a", ""), ("1.jpg", "b", "")])
    run("pack", table, "--out", tmp_path / "out")
    assert "before: 1 pairs; left out 1" in run("pack", table, "--out", tmp_path / "out")
    table = write_table(tmp_path / "b.csv", [("0.jpg", "", "")])
    for _ in range(2):
        assert "no pairs" in run("pack", table, "--out", tmp_path / "none", fails=True)


def test_pictures_of_one_table_may_lie_in_several_folders(tmp_path, packed):
    draw_pictures(tmp_path / "images", [1])
    draw_pictures(tmp_path / "elsewhere", [2])
    rows = [(str(tmp_path / "elsewhere/2.jpg"), "b", ""), ("1.jpg", "a", "")]
    assert packed(write_table(tmp_path / "a.csv", rows))[0] == [(2, ["b"]), (1, ["a"])]


def test_a_folder_of_another_form_is_described(tmp_path, run):
    draw_pictures(tmp_path / "set/images", [1, 2])
    (tmp_path / "set/text").mkdir()
    (tmp_path / "set/text/1.txt").write_text("one")
    answer = run("pack", tmp_path / "set", "--out", tmp_path / "out", fails=True)
    assert "2 pictures in images" in answer and "--classes" in answer
    for name in "ab":
        write_table(tmp_path / f"set/{name}.csv", [("1.jpg", "a", "")])
    answer = run("pack", tmp_path / "set", "--out", tmp_path / "out", fails=True)
    assert "a.csv" in answer and "b.csv" in answer


def test_a_table_that_spells_a_name_in_another_way_and_one_that_is_full(tmp_path, packed, run):
    """é of macOS, two characters, against one; two packs at a time into one folder."""
    draw_pictures(tmp_path, [1])
    (tmp_path / "1.jpg").rename(tmp_path / "cafe\u0301.jpg")
    rows = [("caf\u00e9.jpg", "a", ""), ("cafe\u0301.jpg", "b", "")]
    table = write_table(tmp_path / "a.csv", rows)
    assert packed(table)[0] == [(1, ["a"]), (1, ["b"])]
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "wb") as guard:
        runtime.lock(guard, "")
        assert "another pack" in run("pack", table, "--out", out, fails=True)
    run("pack", table, "--out", out)


def test_what_is_no_source_is_answered_and_nothing_is_guessed(tmp_path, run):
    draw_pictures(tmp_path / "set/cat", [0])
    table = write_table(tmp_path / "a.csv", [("set/cat/0.jpg", "from a table", "")])
    folders = ("--root", tmp_path, "--out", tmp_path / "out")
    for arguments, word in ((["set"], "--classes"), (["a.csv", table], "one table"),
                            (["nowhere"], "nowhere"), (["nowhere.csv"], "nowhere.csv"),
                            ([table, "--shard-size", 0], "--shard-size")):
        assert word in run("pack", *arguments, *folders, fails=True)


def test_class_folders(tmp_path, packed, run):
    draw_pictures(tmp_path / "set/n01", range(30, 50))
    draw_pictures(tmp_path / "set/grey_cat", range(20))
    (tmp_path / "set/words.txt").write_text("n01\ttench, Tinca tinca\ngrey_cat\tgrey cat\n")
    (tmp_path / "set/templates.txt").write_text("a {}\nmany {}\n")
    found, _ = packed("set", "--root", tmp_path, "--classes", "--shard-size", 10)
    tench = ["a tench", "many tench", "a Tinca tinca", "many Tinca tinca"]
    assert sorted(found) == [*((i, ["a grey cat", "many grey cat"]) for i in range(20)),
                             *((i, tench) for i in range(30, 50))]
    for first in range(0, 40, 10):  # each shard mixes the classes
        assert 1 < sum(captions == tench for _, captions in found[first:first + 10]) < 9
    (tmp_path / "set/templates.txt").write_text("one {}\n")  # other captions: another source
    answer = run("pack", tmp_path / "set", "--classes", "--out", tmp_path / "packed0", fails=True)
    assert "another --out" in answer


def test_coco_captions(tmp_path, packed):
    (tmp_path / "far").mkdir()
    (tmp_path / "annotations").symlink_to(tmp_path / "far")  # a link: train2017/ is next to it
    draw_pictures(tmp_path / "train2017", range(3))
    images = [dict(id=10 * i, file_name=f"{i}.jpg") for i in range(3)]
    captions = [[f"caption {k} of {i}" for k in range(i)] for i in range(3)]  # picture 0 has none
    annotations = [dict(image_id=10 * i, caption=text) for i in range(3) for text in captions[i]]
    table = tmp_path / "annotations/captions_train2017.json"
    table.write_text(json.dumps(dict(info={}, images=images, annotations=annotations)))
    assert packed(table)[0] == [(i, captions[i]) for i in (1, 2)]


@pytest.fixture
def yfcc100m(tmp_path):
    """SLIP's layout: images/12/345.zip with 678.jpg.  -> folder, {line number: width - 10}"""
    numbers = {0: 0, 345_999: 1, 12_345_678: 2, 12_345_679: 3, 99_999_001: 4}
    for number, i in numbers.items():
        outer, _, member = readers.yfcc_zip(number).partition(".zip/")
        path = tmp_path / f"{outer}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED if i % 2 else 0) as file:
            file.writestr(member, picture(i))
    assert readers.yfcc_zip(12_345_678) == "images/12/345.zip/678.jpg"
    return tmp_path, numbers


def test_slips_pickle_and_zips(yfcc100m, packed):
    folder, numbers = yfcc100m
    for name in ("50", "70"):
        (folder / "images" / name).mkdir()
    (folder / "images/50/000.zip").write_bytes(b"cut off")
    with zipfile.ZipFile(folder / "images/70/000.zip", "w") as file:
        file.writestr("000.jpg", picture(0))
        file.filelist[0].flag_bits = 1  # the directory says that it is encrypted
    records = [(n, f"title {i}", "" if i == 3 else f"words {i}") for n, i in numbers.items()]
    extra = [(60_000_000, "no such zip", ""), (1, "not in it", ""), (50_000_000, "no zip", ""),
             (70_000_000, "encrypted", "")]
    (folder / "yfcc15m.pkl").write_bytes(pickle.dumps([*records, *extra]))
    found, printed = packed(folder / "yfcc15m.pkl")
    assert found == [(i, [f"title {i}", f"words {i}"][:1 if i == 3 else 2]) for i in range(5)]
    assert "left out 4" in printed
    assert all(word in printed for word in ("001.jpg", "50/000.zip", "encrypted"))


def test_slips_npy(tmp_path, packed):
    draw_pictures(tmp_path, range(2))
    records = [dict(image_id="0.jpg", captions=["a"]),                      # cc3m.npy
               dict(image_id=7, image_name="1.jpg", captions=["b", "c"])]   # cc12m.npy
    np.save(tmp_path / "cc.npy", np.array(records))
    assert packed(tmp_path / "cc.npy")[0] == [(0, ["a"]), (1, ["b", "c"])]


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_does_not_run(tmp_path, run):
    bad = [(1, "title", Malice(tmp_path / "ran"))]
    (tmp_path / "yfcc15m.pkl").write_bytes(pickle.dumps(bad))
    np.save(tmp_path / "cc3m.npy", np.array([dict(image_id="x", captions=bad)]), allow_pickle=True)
    for name in ("yfcc15m.pkl", "cc3m.npy"):
        assert "system" in run("pack", tmp_path / name, "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "cc3m.npy", allow_pickle=True)  # a file that would have run
    assert (tmp_path / "ran").exists()


# ---------------------------------------------------------------- pack

def test_pack_resizes_and_keeps_bytes_and_resumes(tmp_path, run):
    array = np.full((300, 100, 3), 200, np.uint8)
    array[:, ::3] //= 3
    write_shard(tmp_path / "in/0.tar", [*members([0], "png", picture_bytes(array)),
                                        *members(range(1, 5)), *members([5], "jpg", TRUNCATED)])
    out = tmp_path / "out"
    command = ("pack", tmp_path / "in", "--out", out, "--shard-size", 2, "--size", 64)
    printed = run(*command)
    assert "packed 5 pairs" in printed and "0.tar at" in printed
    pairs = data.Pairs([str(out)])
    assert [data.decode(pairs[i][0]).width - 10 for i in range(5)] == [54, 1, 2, 3, 4]
    assert pairs[1][0] == picture(1)  # small enough: its bytes stay
    exact = Image.fromarray(array).resize((64, 192), Image.BICUBIC)
    difference = np.array(data.decode(pairs[0][0])) - np.array(exact, float)
    assert np.abs(difference).mean() < 3  # once through JPEG

    paths = shards.find_shards(out)
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    assert "kept 2 shards" in run(*command)
    assert [path.read_bytes() for path in shards.find_shards(out)] == before
    assert "another --out" in run(*command[:-1], 32, fails=True)
    write_shard(tmp_path / "in/1.tar", members(range(2)))
    assert "another --out" in run(*command, fails=True)
    assert "not empty" in run("pack", tmp_path / "in", "--out", tmp_path / "in", fails=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_pack_that_is_stopped_resumes(tmp_path, run, number):
    large = picture_bytes("red", (1200, 1200))  # a small file, and some 20 ms to resize
    write_shard(tmp_path / "in/0.tar", members(range(320), "png", large))
    out = tmp_path / "out"
    command = ("pack", tmp_path / "in", "--out", out, "--size", 20, "--shard-size", 4)
    process = start("tools/prepare.py", *command, start_new_session=True)
    while not shards.find_shards(out):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches all processes too
    status, printed, error = finish(process)
    assert status == (1 if number == signal.SIGINT else -9), printed + error
    assert "Traceback" not in error
    assert "resumes" in data.Pairs([str(out)]).warnings[0]
    times = {path: path.stat().st_mtime_ns for path in shards.find_shards(out)}
    run(*command)
    assert len(contents(out)) == 320 and not list(out.glob("*partial*"))
    assert all(path.stat().st_mtime_ns == changed for path, changed in times.items())


# ---------------------------------------------------------------- check, show, stats, yfcc

def test_check_names_what_is_bad(tmp_path, run):
    write_shard(tmp_path / "a/0.tar", members(range(2)))
    assert "0 of 2 pairs are bad" in run("check", f"{tmp_path / 'a'}:3")  # each once
    bad = [*members("x", content=TRUNCATED), ("y.jpg", picture(0)), ("y.txt", b" ")]
    write_shard(tmp_path / "b/0.tar", [*bad, *members(range(2))])
    printed = run("check", tmp_path / "a", tmp_path / "b", fails=True)
    assert "2 of 6 pairs are bad" in printed and "truncated" in printed and "a/0.tar" not in printed
    assert printed.count("b/0.tar at byte") == 2
    os.truncate(tmp_path / "a/0.tar", 3000)  # cut off
    assert "warning" in run("check", tmp_path / "a", fails=True)


def test_show_and_stats(tmp_path, run):
    write_shard(tmp_path / "0.tar", [*members(range(9)), *members("x", content=b"spoilt")])
    run("show", tmp_path, "--out", tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    tiles = sheet.reshape(4, 294, 6, 232, 3).swapaxes(1, 2).reshape(24, 294, 232, 3)
    drawn = [(np.abs(tile[6:226, 6:226] - (90, 30, 200)).max(-1) < 12).all() for tile in tiles]
    assert sum(drawn) == 9  # each once, and one is spoilt
    printed = run("stats", tmp_path)
    assert "10 pairs in 1 shards" in printed and "caption: median 2, 95 % 2, most 2" in printed
    assert "shorter side: median 14, 95 % 18, most 18" in printed


def test_yfcc_cleans_captions_as_slip(yfcc100m, run, packed):
    """Lines of the true form, 25 columns; made-up values, URL-quoted as Flickr's."""
    folder, numbers = yfcc100m
    cases = {0: ("Old+boat%2C+%3Cb%3ELake%3C%2Fb%3E", "a+http%3A%2F%2Fx.org%2Fa+or+www.y.org+b",
                 ["Old boat, Lake", "a or b"]),
             345_999: ("%3Ca+href%3D%22http%3A%2F%2Fx.org%22%3Etext%3C%2Fa%3E", "", ["text"]),
             12_345_678: ("http%3A%2F%2Fonly.a%2Furl", "%3Ci%3E%3C%2Fi%3E", []),
             12_345_679: ("tab%09and%0Aline", "1%2B1 caf%C3%A9", ["tab and line", "1 1 café"]),
             99_999_001: ("DSC_0001", "", ["DSC_0001"])}
    lines = []
    for number, (title, description, _) in (cases | {7: ("not in the list", "", [])}).items():
        cells = [str(number), "1", f"{number:032x}", *["x"] * 22]
        cells[8:10] = title, description
        lines.append("\t".join(cells) + "\n")
    table = folder / "dataset.txt"
    table.write_text("".join(lines))
    subset = folder / "subset.txt"
    subset.write_text("".join(f"{number}\t1\t2\n" for number in cases))
    out = folder / "yfcc15m.tsv"
    assert "4 of 5 pictures" in run("yfcc", subset, table, "--out", out)
    assert packed(out)[0] == [(numbers[n], case[2]) for n, case in cases.items() if case[2]]
    assert "exists" in run("yfcc", subset, table, "--out", out, fails=True)

    zipped = folder / "dataset.txt.bz2"
    zipped.write_bytes(bz2.compress(table.read_bytes()))
    run("yfcc", subset, zipped, "--hashed", "--out", folder / "hashed.tsv")
    first = (folder / "hashed.tsv").read_text("utf-8").splitlines()[1]
    assert first.startswith(f"000/000/{0:032x}.jpg\tx\tOld boat")

    zipped.write_bytes(zipped.read_bytes()[:-20])  # cut off
    older = folder / "older.txt"
    older.write_text("6985418911\tx\n")  # an older table's photo identifier
    for arguments, word in (((subset, zipped), "cut off"), ((older, table), "number")):
        assert word in run("yfcc", *arguments, "--out", folder / "no.tsv", fails=True)
    assert not (folder / "no.tsv").exists()
