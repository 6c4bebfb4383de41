"""The table of runs compared, against values computed by hand."""
import dataclasses
import json
import math
from statistics import mean, stdev, variance

import pytest
import torch
from helpers import answer

import evaluate
import train
from tools import compare

CLIP, OURS = [0.401, 0.415, 0.444], [0.5, 0.52, 0.51]


def save_run(folder, scores=(), method="clip", log=((100, 1.0), (200, 3.0), (400, 2.0)), epoch=2.0,
             pairs="640 pairs, 0", protocol=(), **changes):
    """A run of 20 steps.  log: [(pictures/s, GiB)]; each score again for other weights."""
    folder.mkdir(parents=True)
    given = dict(data=["demo"], method=method, out=str(folder)) | changes
    config = dataclasses.asdict(train.make_config(given))
    torch.save(dict(model={}, model_config={}, step=20, config=config, pairs=pairs),
               folder / "last.pt")
    lines = [dict(step=20, epoch=epoch, pictures_per_s=x, memory_gib=y) for x, y in log]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sha256 = evaluate.file_sha256(folder / "last.pt")
    lines = []
    for task, values in dict(scores).items():
        record = dict(task=task, protocol=dict(path=str(folder), penalty=epoch, **dict(protocol)))
        lines.append(record | dict(sha256=sha256, scores=values))
        lines.append(record | dict(sha256="other", scores={name: 0.99 for name in values}))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(folder):
    """-> rows of cells, the first of heads, and the notes"""
    lines = compare.compare(sorted(folder.iterdir())).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert set(rows.pop(1)) == {"---"} and len({len(row) for row in rows}) == 1
    return rows, "\n".join(line for line in lines if line[:1] == "-")


def per_cent(values):
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def test_means_over_seeds_and_the_standard_error_of_differences(tmp_path):
    for seed, x in enumerate(CLIP):
        save_run(tmp_path / f"c{seed}", {"linear imagenet": {"accuracy": x, "other": 0.7}},
                 seed=seed, workers=seed, log=((100, 1.0), (200, 2.0), (400, 1.5 + seed)))
    for seed, x in enumerate(OURS):
        recall = {"i2t R@1": x / 2, "i2t R@5": 0.9, "t2i R@1": x / 4}
        scores = {"linear imagenet": {"accuracy": x}, "retrieval set": recall}
        save_run(tmp_path / f"m{seed}", scores, "maskclip", [(50, 5)], seed=seed)
    save_run(tmp_path / "z", {"linear imagenet": {"accuracy": 0.9}}, "mae", [])  # one: no error
    rows, notes = table(tmp_path)
    assert rows[0] == ["", "seeds", "memory", "time", "linear imagenet accuracy",
                       "retrieval set i2t R@1", "retrieval set t2i R@1", "retrieval set rSum"]
    assert rows[1] == ["clip", "3", "1.00x", "1.00x", per_cent(CLIP), "-", "-", "-"]
    error = math.sqrt(variance(OURS) / 3 + variance(CLIP) / 3)
    gap = f"({100 * (mean(OURS) - mean(CLIP)):+.1f} ± {100 * error:.1f})"
    memory = (2 + 2.5 + 3.5) / 3
    assert rows[2] == ["maskclip", "3", f"{5 / memory:.2f}x", "4.00x", f"{per_cent(OURS)} {gap}",
                       per_cent([x / 2 for x in OURS]), per_cent([x / 4 for x in OURS]),
                       per_cent([0.9 + 0.75 * x for x in OURS])]
    assert rows[3][1:5] == ["1", "-", "-", "90.0"]
    assert rows[5] == ["paper: maskclip", "", "19 GB", "1.75x", "73.7", "-", "-", "-"]
    assert rows[6][:5] == ["paper: mae", "", "-", "-", "56.2"] and "standard error" in notes


def test_rows_columns_and_notes(tmp_path):
    """A row differs in more than the seed; a fitted penalty and a path are no protocol."""
    save_run(tmp_path / "a", {"linear x": {"top-1": 0.5}})
    save_run(tmp_path / "b", {"linear x": {"top-1": 0.7}}, micro_batch=2, epoch=1.5, root="other")
    save_run(tmp_path / "c", {"linear x": {"top-1": 0.2}}, seed=1, protocol=dict(view="v"))
    save_run(tmp_path / "d", {"linear x": {"top-1": 0.9}}, lr=0.5)
    save_run(tmp_path / "e", pairs="639 pairs, 1")
    rows, notes = table(tmp_path)
    assert rows[0] == ["", "seeds", "memory", "time", "linear x top-1", "linear x top-1"]
    assert [row[:2] + row[4:] for row in rows[1:4]] == [
        ["clip", "2", f"{per_cent([0.5, 0.7])}, 2 of 3 runs", "20.0, 1 of 3 runs"],
        ["clip --lr 0.5", "1", "90.0", "-"], ["clip --data ['demo'] (639 pairs, 1)", "1", "-", "-"]]
    for words in ('column 6: the protocol is {"view": "v"}', "clip: a run is not at its end: 7 "):
        assert words in notes
    torch.save(dict(config={}), tmp_path / "a/last.pt")
    with pytest.raises(ValueError, match="train.py"):
        compare.compare([tmp_path / "a"])


@pytest.mark.parametrize("file,content,word", [
    ("last.pt", None, "last.pt"), ("last.pt", b"torn", "damaged"),
    ("log.jsonl", b'{"step": 1, "epoch": 1}\n{"st\n{}\n', "damaged"),
    ("results.jsonl", b"[\n", "line 1")])
def test_one_sentence_says_what_is_wrong(file, content, word, tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "a")
    with open(tmp_path / "a/log.jsonl", "a") as log:
        log.write('{"step": 3')  # it was killed
    assert len(table(tmp_path)[0]) == 3
    (tmp_path / "a" / file).unlink()
    if content:
        (tmp_path / "a" / file).write_bytes(content)
    sentence = answer(compare.main, [tmp_path / "a"], monkeypatch, capsys)
    assert word in sentence and str(tmp_path / "a") in sentence
