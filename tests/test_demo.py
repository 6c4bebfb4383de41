"""The demo world is true, its sets are apart, and it is drawn once, or not at all."""
import os

import numpy as np
import pytest

from support import demo
from support.shards import Shards


def test_captions_say_what_the_labels_show():
    """Every object is named with its size, nothing else is, and the relation is true."""
    seen = set()
    for i in range(60):
        rng = np.random.default_rng([7, i])
        _, labels, objects, ground = demo.draw_scene(rng, 2 + i % 2, demo.CLASSES)
        text = demo.describe(objects, ground, rng, full=True)
        assert all(f"{o['size']} {o['name']}" in text for o in objects)
        assert sum(text.count(shape) for shape in demo.SHAPES) == len(objects)
        order = sorted(objects, key=lambda o: text.index(f"{o['size']} {o['name']}"))
        middles = [np.argwhere(np.array(labels) == 1 + demo.CLASSES.index(o["name"])).mean(0)
                   for o in order]
        for relation, axis, sign in (("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1),
                                     ("below", 0, 1)):
            if f" {relation} " in text:
                assert sign * (middles[0] - middles[1])[axis] > 0, text
                seen.add(relation)
    assert len(seen) == 4


def test_the_picture_is_red_where_the_label_says_so():
    picture, labels, _, _ = demo.draw_scene(np.random.default_rng(3), 1, ["red circle"])
    pixels = np.array(picture).astype(int)
    inside = np.array(labels) > 0
    red = (pixels[..., 0] > pixels[..., 1] + 80) & (pixels[..., 0] > pixels[..., 2] + 80)
    assert (red == inside).mean() > 0.97 and inside.sum() > 100


@pytest.mark.slow
def test_all_sets_are_drawn_once_and_share_no_picture(tmp_path):
    (tmp_path / "demo").mkdir()  # an empty folder is drawn into
    folder = demo.draw_demo(tmp_path / "demo", shards=2, shard_size=60)
    train = Shards(folder / "train", ["00000.tar", "00001.tar"])
    pairs = [train.read(i) for i in range(len(train))]
    tests = [path.read_bytes() for path in folder.rglob("*.png") if "labels" not in path.parts]
    assert len(pairs) == 120 and len(tests) == 500 + 42 * (20 + 12) + 200
    assert len({*tests, *(content for content, _ in pairs)}) == len(tests) + 120
    before = os.stat(folder / "demo.json").st_mtime_ns
    demo.draw_demo(folder, shards=2, shard_size=60)
    assert os.stat(folder / "demo.json").st_mtime_ns == before


def test_training_pairs_hold_no_held_out_combination(tmp_path):
    demo.draw_shard(tmp_path, 0, 60, 0)
    train = Shards(tmp_path, ["00000.tar"])
    captions = " ".join(train.captions(i)[0] for i in range(60))
    assert "white star" in captions and not any(name in captions for name in demo.HELD_OUT)


def test_the_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/thesis.txt").write_text("text")
    with pytest.raises(FileExistsError, match="not drawn"):
        demo.draw_demo(tmp_path / "demo")
    assert [path.name for path in tmp_path.rglob("*")] == ["demo", "thesis.txt"]


def test_a_drawing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")
    monkeypatch.setattr(demo, "draw_scene", fail)
    with pytest.raises(OSError, match="space"):
        demo.draw_demo(tmp_path / "demo", shards=1, shard_size=1)
    assert list(tmp_path.iterdir()) == []
