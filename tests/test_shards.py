"""Shards are read as webdataset's, their index is rebuilt when they change, damage is named."""
import gzip
import json
import os
import pickle
import re
import tarfile

import pytest
from helpers import picture_bytes, write_shard

from support import shards

PICTURE = picture_bytes()


def members(numbers, text="text"):
    """A pair for each number: its bytes and its caption end in the number."""
    for i in numbers:
        yield f"{i}.png", PICTURE + str(i).encode()
        yield f"{i}.txt", f"{text} {i}".encode()


def open_all(folder):
    return shards.Shards(folder, [path.name for path in shards.find_shards(folder)])


def numbers_of(opened):
    """The number of each pair, read from its picture and its caption."""
    read = [opened.read(i) for i in range(len(opened))]
    numbers = [int(captions[0].split()[-1]) for _, captions in read]
    assert [content for content, _ in read] == [PICTURE + str(n).encode() for n in numbers]
    return numbers


def test_texts_and_json_are_read_and_what_has_no_partner_is_counted(tmp_path):
    fields = dict(caption="two", title=" ", description="no title", url="http://x", width=3)
    write_shard(tmp_path / "0.tar", [
        ("a.jpg", b"A"), ("a.txt", b"one"), ("a.json", b'{"text": "1"}'), ("dir/b.PNG", b"B"),
        ("dir/b.json", json.dumps(fields).encode()), ("c.webp", b"C"), ("c.json", b"{}"),
        ("c.txt", b" three \n"), ("d.jpeg", b"D"), ("d.json", b'{"captions": ["4", "four"]}'),
        ("lonely.jpg", b"E"), ("e.cls", b"1")])
    opened = open_all(tmp_path)
    assert [opened.read(i) for i in range(len(opened))] == [
        (b"A", ["one"]), (b"B", ["two", "no title"]), (b"C", ["three"]), (b"D", ["4", "four"])]
    assert len(opened.warnings) == 1 and "1 pictures or captions" in opened.warnings[0]
    assert "0.tar at byte" in opened.name(2)


@pytest.mark.parametrize("files,kept,warning", [
    ({"0.png": b"mask", "0.jpg": b"A", "0.txt": b"a", "1.jpg": b"B"}, [(b"A", "a")],
     "holds 1 .*key.*(0).*holds 1 .*partner"),
    ({"0.image.jpg": b"A", "0.text.txt": b"a", "1.jpg": b"B", "1.txt": b"b"},
     [(b"A", "a"), (b"B", "b")], ""),
    ({"a.1.jpg": b"A", "a.1.txt": b"a", "a.2.jpg": b"B", "a.2.txt": b"b"},
     [(b"A", "a"), (b"B", "b")], ""),
    ({"0.jpg": b"A", "0.alt.txt": b"a", "0.blip.txt": b"b", "1.jpg": b"B", "1.txt": b"b"},
     [(b"B", "b")], "holds 3 .*partner"),  # none of two texts is guessed
    ({"0.jpg": b"A", "0.txt": b"", "0.json": b'{"caption": "a"}'}, [(b"A", "a")], ""),
    ({"0.jpg": b"A", "0.json": b'{"caption": "a"}', "0.txt": b""}, [(b"A", "a")], ""),
    ({".ipynb_checkpoints/0.jpg": b"x", ".ipynb_checkpoints/0.txt": b"x", "./0.gif": b"A",
      "./0.txt": b"a", "__MACOSX/1.jpg": b"x", "__MACOSX/1.txt": b"x"}, [(b"A", "a")], "")])
def test_what_is_in_a_shard_is_used_or_counted(tmp_path, files, kept, warning):
    write_shard(tmp_path / "0.tar", files.items())
    opened = open_all(tmp_path)
    assert [opened.read(i) for i in range(len(opened))] == [(image, [text]) for image, text in kept]
    assert re.search(warning, " ".join(opened.warnings)) and bool(opened.warnings) == bool(warning)


def test_a_key_twice_and_a_second_archive_are_named(tmp_path):
    write_shard(tmp_path / "0.tar", [*members(range(6)), *members(range(6))])
    one = write_shard(tmp_path / "1.tar", members(range(3))).read_bytes()
    (tmp_path / "1.tar").write_bytes(one + one)
    opened = open_all(tmp_path)
    assert numbers_of(opened) == [*range(6), *range(3)]
    assert "holds 12 pictures" in opened.warnings[0] and "second archive" in opened.warnings[1]


def test_gzip_and_a_huge_member_are_named(tmp_path):
    plain = write_shard(tmp_path / "1.tar", members(range(2))).read_bytes()
    (tmp_path / "0.tar").write_bytes(gzip.compress(plain))
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        shards.add_member(tar, "0.png", PICTURE)
        huge = tarfile.TarInfo("0.txt")
        huge.size = 2 ** 33  # a hole in the file
        tar.addfile(huge)
        tar.fileobj.seek(tar.fileobj.tell() + huge.size)
        tar.offset += huge.size
    opened = open_all(tmp_path)
    assert len(opened) == 2 and "decompress" in opened.warnings[0]
    assert "huge" in opened.warnings[1]


def test_links_and_names_that_are_not_utf_8(tmp_path):
    write_shard(tmp_path / "0.tar", members(range(1)))
    with tarfile.open(tmp_path / "1.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members(range(1)):
            shards.add_member(tar, name, content)
            link = tarfile.TarInfo(name.replace("0", "1"))
            link.type, link.linkname = tarfile.LNKTYPE, name
            tar.addfile(link)
            shards.add_member(tar, "caf\udce9" + name, content)
    opened = open_all(tmp_path)
    assert len(opened) == 3 and "holds 2 " in opened.warnings[0]


def test_a_full_disk_is_named_by_what_it_refuses(tmp_path):
    with pytest.raises(OSError, match="pairs.index.*No space"):
        with shards.atomic_write(tmp_path / "pairs.index"):
            raise OSError(28, "No space left on device")  # as write() raises it
    assert not list(tmp_path.iterdir())


def test_texts_that_are_not_utf_8_are_bad_pairs(tmp_path):
    write_shard(tmp_path / "0.tar", [("0.png", PICTURE), ("0.txt", "café".encode("latin1"))])
    with pytest.raises(ValueError, match="utf-8"):
        open_all(tmp_path).read(0)


def test_a_shard_of_the_same_size_that_changes(tmp_path):
    """Its pairs are bad in what was opened before, and the fingerprint is another one."""
    write_shard(tmp_path / "0.tar", members(range(3), "a text"))
    opened = open_all(tmp_path)
    opened.read(0)
    os.utime(write_shard(tmp_path / "copy/0.tar", members(range(3), "a text")), (0, 0))
    assert open_all(tmp_path / "copy").fingerprint == opened.fingerprint  # times do not matter
    write_shard(tmp_path / "0.tar", members(range(3), "b text"))
    with pytest.raises(OSError, match="changed"):
        opened.read(1)
    assert open_all(tmp_path).fingerprint != opened.fingerprint


@pytest.mark.peers
def test_webdatasets_shards_are_read(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:  # img2dataset's writer
        for i in range(5):
            writer.write({"__key__": f"{i:09d}", "png": PICTURE + str(i).encode(),
                          "txt": f"text {i}", "json": dict(caption="other", status="success")})
    assert numbers_of(open_all(tmp_path)) == list(range(5))


@pytest.mark.parametrize("text", [b"{}", b'["caption"]', b"{", b'{"caption": " ", "title": 7}'])
def test_a_record_without_a_caption_is_a_bad_pair(tmp_path, text):
    write_shard(tmp_path / "0.tar", [("0.png", PICTURE), ("0.json", text)])
    with pytest.raises(ValueError):
        open_all(tmp_path).read(0)


def test_some_shards_of_a_folder_in_any_order(tmp_path):
    for i in range(4):
        write_shard(tmp_path / f"{i}.tar", members(range(3 * i, 3 * i + 3 - i % 2)))
    names = ["3.tar", "2.tar", "3.tar"]
    some = shards.Shards(tmp_path, names)
    assert some.sizes.tolist() == [2, 3, 2]
    assert numbers_of(some) == [9, 10, 6, 7, 8, 9, 10]
    assert some.fingerprint == shards.Shards(tmp_path, names).fingerprint
    assert some.fingerprint != shards.Shards(tmp_path, sorted(names)).fingerprint
    assert numbers_of(pickle.loads(pickle.dumps(some))) == numbers_of(some)


def test_the_index_is_kept_until_a_shard_changes_or_it_is_damaged(tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"{i}.tar", members(range(4 * i, 4 * i + 4)))
    index = tmp_path / "pairs.index"
    first = open_all(tmp_path)
    written = index.stat().st_ino
    assert open_all(tmp_path).fingerprint == first.fingerprint
    assert index.stat().st_ino == written
    write_shard(tmp_path / "1.tar", members(range(20, 25)))
    write_shard(tmp_path / "3.tar", members(range(30, 32)))
    (tmp_path / "0.tar").unlink()
    changed = [20, 21, 22, 23, 24, 8, 9, 10, 11, 30, 31]
    assert numbers_of(open_all(tmp_path)) == changed
    assert open_all(tmp_path).fingerprint != first.fingerprint
    complete = index.read_bytes()
    for spoilt in (b"", complete[:5], complete[:-9], b"{}\n", b"[]\n", b"12\n"):
        index.write_bytes(spoilt)
        assert numbers_of(open_all(tmp_path)) == changed
        assert index.read_bytes() == complete


def test_a_read_only_folder_is_indexed_in_the_users_cache(tmp_path, monkeypatch):
    for name in ("plain", "delivered"):
        write_shard(tmp_path / name / "0.tar", members(range(3)))
    open_all(tmp_path / "delivered")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(shards.os, "access", lambda path, mode: False)
    for name in ("plain", "delivered"):
        assert numbers_of(open_all(tmp_path / name)) == [0, 1, 2]
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["0.tar"]
    assert len(list((tmp_path / "cache/maskclip").iterdir())) == 1  # the other has its index


@pytest.mark.parametrize("more", [520, 0, 100], ids=["in a picture", "between", "in a header"])
def test_a_shard_that_ends_early_gives_the_pairs_before(tmp_path, more):
    path = write_shard(tmp_path / "0.tar", members(range(6)))
    assert open_all(tmp_path).warnings == []
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    path.write_bytes(content[:offset + more])
    for _ in range(2):  # from the tar, then from the index
        opened = open_all(tmp_path)
        assert numbers_of(opened) == [0, 1, 2]
        assert len(opened.warnings) == 1 and "0.tar is damaged" in opened.warnings[0]


def _end(i):
    if i == 1:
        os.kill(os.getpid(), 9)
    return i


def test_a_process_that_is_killed_is_an_error_and_not_a_wait(tmp_path):
    assert list(shards.in_parallel(str, [2, 0])) == ["2", "0"]
    with pytest.raises(OSError, match="killed"):
        list(shards.in_parallel(_end, range(3)))


def test_a_file_that_is_not_complete_does_not_take_its_name(tmp_path):
    with pytest.raises(ZeroDivisionError), shards.atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone")
def test_cores_are_those_that_the_process_may_use(monkeypatch):
    """A container or a scheduler may give fewer than the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert shards.cpu_count() == 3
