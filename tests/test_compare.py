"""The table of runs compared, against values computed by hand."""
import dataclasses
import json
import math
import statistics

import torch
from helpers import answer

import train
from support.results import file_sha256
from tools import compare

CLIP, SLIP, OURS = [0.401, 0.415, 0.444], [0.43, 0.45], [0.5, 0.52, 0.51]


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
    sha256 = file_sha256(folder / "last.pt")
    lines = []
    for task, values in dict(scores).items():
        record = dict(task=task, protocol=dict(path=str(folder), penalty=epoch, **dict(protocol)))
        lines.append(record | dict(sha256=sha256, scores=values))
        lines.append(record | dict(sha256="other", scores={name: 0.99 for name in values}))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(text):
    """-> rows of cells, the first of heads, and the notes"""
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert set(rows.pop(1)) == {"---"} and len({len(row) for row in rows}) == 1
    return rows, [line for line in lines if line[:1] == "-"]


def per_cent(values):
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def test_means_over_seeds_and_the_standard_error_of_differences(tmp_path):
    for seed, x in enumerate(CLIP):
        save_run(tmp_path / f"c{seed}", {"linear imagenet": {"accuracy": x, "other": 0.7}},
                 seed=seed, workers=seed, log=((100, 1.0), (200, 2.0), (400, 1.5 + seed)))
    for seed, x in enumerate(OURS):
        recall = {"i2t R@1": x / 2, "i2t R@5": 0.9, "t2i R@1": x / 4}
        scores = {"linear imagenet": {"accuracy": x}, "retrieval set": recall}
        save_run(tmp_path / f"m{seed}", scores, "maskclip", [(50, 5)], seed=seed)
    for seed, x in enumerate(SLIP):
        save_run(tmp_path / f"s{seed}", {"linear imagenet": {"accuracy": x}}, "slip", [(100, 6.25)],
                 seed=seed)
    save_run(tmp_path / "z", {"linear imagenet": {"accuracy": 0.9}}, "mae")  # one: no error
    rows, notes = read(compare.compare(sorted(tmp_path.iterdir())))
    assert rows[0] == ["", "seeds", "memory", "time", "linear imagenet accuracy",
                       "retrieval set i2t R@1", "retrieval set t2i R@1"]
    memory = (2 + 2.5 + 3.5) / 3
    assert rows[1] == ["clip", "3", "1.00x", "1.00x", per_cent(CLIP), "-", "-"]
    assert rows[2] == ["maskclip", "3", f"{5 / memory:.2f}x", "4.00x", per_cent(OURS),
                       per_cent([x / 2 for x in OURS]), per_cent([x / 4 for x in OURS])]
    assert rows[3][:2] == ["slip", "2"] and rows[4][4] == "90.0"
    for row, label, values in ((rows[5], "maskclip", OURS), (rows[6], "slip", SLIP)):
        error = 100 * math.sqrt(statistics.variance(values) / len(values)
                                + statistics.variance(CLIP) / 3)
        gap = 100 * (statistics.mean(values) - statistics.mean(CLIP))
        assert row[:5] == [f"{label} less CLIP", "", "", "", f"{gap:+.1f} ± {error:.1f}"]
    assert rows[7][4:] == ["-", "-", "-"]
    assert rows[9] == ["paper: maskclip", "", "19 GB", "1.75x", "73.7", "-", "-"]
    assert rows[11][:5] == ["paper: mae", "", "-", "-", "56.2"] and "standard error" in notes[0]


def test_rows_columns_and_notes(tmp_path):
    """A row differs in more than the seed; a fitted penalty and a path are no protocol."""
    assert sorted(compare.SAME_ROW) == sorted(["seed", *train.MAY_DIFFER])
    save_run(tmp_path / "a", {"linear x": {"top-1": 0.5}}, log=[(0.0, 1.0), (100, None)])
    save_run(tmp_path / "b", {"linear x": {"top-1": 0.7}}, micro_batch=2, epoch=1.5, root="other")
    save_run(tmp_path / "c", {"linear x": {"top-1": 0.2}}, seed=1, protocol=dict(view="v"),
             pairs="639 pairs, 1")
    save_run(tmp_path / "d", {"linear x": {"top-1": 0.9}}, lr=0.5)
    rows, notes = read(compare.compare([tmp_path / name for name in "abcd"]))
    assert rows[:3] == [["", "seeds", "memory", "time", "linear x top-1", "linear x top-1"],
                        ["clip", "2", "-", "-", f"{per_cent([0.5, 0.7])} (2 of 3 runs)",
                         "20.0 (1 of 3 runs)"],
                        ["clip --lr 0.5", "1", "-", "-", "90.0", "-"]]
    for words in ("different data", 'column 6: the protocol is {"view": "v"}', "/b is not at its "):
        assert sum(words in note for note in notes) == 1


def test_one_sentence_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    for name in ("a", "young", "torn", "tuned", "odd", "lost"):
        save_run(tmp_path / name)
    (tmp_path / "young/last.pt").unlink()
    (tmp_path / "torn/last.pt").write_bytes(b"torn")
    torch.save(dict(config={}), tmp_path / "tuned/last.pt")
    (tmp_path / "odd/log.jsonl").write_text('{"step": 1, "epoch": 1}\n{"st\n{}\n')
    (tmp_path / "lost/results.jsonl").write_text("[\n")
    for name, word in (("none", "last.pt"), ("young", "last.pt"), ("torn", "damaged"),
                       ("tuned", "train.py"), ("odd", "damaged"), ("lost", "line 1")):
        sentence = answer(compare.main, [tmp_path / "a", tmp_path / name], monkeypatch, capsys)
        assert word in sentence and name in sentence and sentence.strip().count("\n") == 0
    with open(tmp_path / "a/log.jsonl", "a") as file:
        file.write('{"step": 3')  # a run that is not at its end
    assert len(read(compare.compare([tmp_path / "a"]))[0]) == 3
