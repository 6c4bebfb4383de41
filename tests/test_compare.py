"""The table of runs compared, against values computed by hand."""
import dataclasses
import json
import math
import re
import statistics

import pytest
import torch
from test_train import answer

import evaluate
import train
from downstream import pictures


def save_run(folder, scores=(), method="clip", log=((100, 1.0), (200, 3.0), (400, 2.0)), epoch=2.0, **changes):
    """A run of 20 steps as train.py leaves it, but for the weights.  log: [(pictures/s, GiB)] -> folder

    scores: {task: {name: share}}; as many again are of other weights.
    """
    folder.mkdir(parents=True)
    config = dataclasses.asdict(train.resolve(dict(data=["demo"], method=method, out=str(folder)) | changes))
    torch.save(dict(model=dict(x=torch.tensor([float(config["seed"])])), model_config=dict(method=method), step=20,
                    config=config, made_by=dict(commit=40 * "a"), pairs="640 pairs, 0"), folder / "last.pt")
    (folder / "log.jsonl").write_text("".join(json.dumps(dict(step=20, epoch=epoch, pictures_per_s=x, memory_gib=y))
                                              + "\n" for x, y in log))
    record = dict(sha256=evaluate.Cache(folder / "last.pt").sha256, chance=0.1)
    records = [record | dict(task=task, scores=values, protocol=dict(pictures=9))
               for task, values in dict(scores).items()]
    (folder / "results.json").write_text(json.dumps([
        *records,
        *(record | dict(sha256="other", scores={name: 0.99 for name in record["scores"]}) for record in records)]))
    return folder


def read(text):
    """-> our table and the paper's, [{head: cell}] with the label at "", and the notes"""
    tables, notes = [], []
    for block in text.split("\n\n"):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line[0] == "|"]
        if rows:
            assert len({len(line) for line in block.splitlines()}) == 1  # columns stand below one another
            assert all(re.fullmatch("-+:?", cell) for cell in rows[1])
            tables.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
        else:
            notes = [line.removeprefix("- ") for line in block.splitlines()]
    return tables[0], tables[1:], notes


def per_cent(values):
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def test_rows_are_means_over_seeds_and_differences_have_their_standard_error(tmp_path):
    near, far, also = [0.401, 0.415, 0.444], [0.43, 0.45], [0.5, 0.52, 0.51]
    for seed, x in enumerate(near):
        save_run(tmp_path / f"c{seed}", {"zeroshot set": {"top-1": x, "mean per class": 0.7}}, seed=seed, workers=seed,
                 log=((100, 1.0), (200, 2.0), (400, 1.5 + seed)))
    for seed, x in enumerate(far):
        save_run(tmp_path / f"s{seed}", {"zeroshot set": {"top-1": x}}, "slip", log=[(100, 6.25)], seed=seed)
    for seed, x in enumerate(also):
        save_run(tmp_path / f"m{seed}", {"zeroshot set": {"top-1": x}, "retrieval set": {
            "i2t R@1": x / 2, "i2t R@5": 0.9, "t2i R@1": x / 4}}, "maskclip", log=[(50, 5)], seed=seed)
    save_run(tmp_path / "z", {"zeroshot set": {"top-1": 0.9}}, "clip_mae")  # one run has no standard error
    rows, (paper,), notes = read(evaluate.compare(sorted(tmp_path.iterdir())))
    assert [row[""] for row in rows] == [
        "clip", "maskclip", "slip", "clip_mae", "maskclip less clip", "slip less clip"]
    assert list(rows[0]) == ["", "seeds", "epochs", "minutes", "memory", "time", "zeroshot set top-1",
                             "retrieval set i2t R@1", "retrieval set t2i R@1"]
    memory = (2 + 2.5 + 3.5) / 3
    assert list(rows[0].values()) == ["clip", "3", "2", f"{20 * 64 / 200 / 60:.1f}", "1.00x", "1.00x", per_cent(near),
                                      "-", "-"]
    assert list(rows[1].values()) == ["maskclip", "3", "2", f"{20 * 64 / 50 / 60:.1f}", f"{5 / memory:.2f}x", "4.00x",
                                      per_cent(also), per_cent([x / 2 for x in also]), per_cent([x / 4 for x in also])]
    assert list(rows[2].values())[1:6] == ["2", "2", "0.2", f"{6.25 / memory:.2f}x", "2.00x"]
    for row, ours, star in ((rows[4], also, "*"), (rows[5], far, "")):
        error = math.sqrt(statistics.stdev(ours) ** 2 / len(ours) + statistics.stdev(near) ** 2 / 3)
        gap = statistics.mean(ours) - statistics.mean(near)
        assert row["zeroshot set top-1"] == f"{100 * gap:+.1f} ± {100 * error:.1f}{star}"
        assert abs(gap) > error and (abs(gap) > 2 * error) == bool(star) and row["seeds"] == row["time"] == ""
        assert row["retrieval set i2t R@1"] == "-"
    assert [list(row.values()) for row in paper] == [
        ["paper: clip", "14 G", "1.00x", "37.6", "66.5", "52.9", "32.8"],
        ["paper: maskclip", "19 G", "1.75x", "44.5", "73.7", "70.1", "45.6"],
        ["paper: slip", "30 G", "2.67x", "42.8", "72.1", "58.6", "41.3"],
        ["paper: clip_mae", "16 G", "1.30x", "42.1", "68.5", "57.3", "41.1"]]
    assert "standard error" in notes[0] and "`*`" in notes[0] and len(notes) == 2
    assert notes[1] == "commits: clip aaaaaaa; maskclip aaaaaaa; slip aaaaaaa; clip_mae aaaaaaa"


def test_one_run_alone(tmp_path):
    rows, (paper,), notes = read(evaluate.compare([save_run(tmp_path / "a", {"linear x": {"top-1": 0.5}}, "maskclip")]))
    assert [list(row.values()) for row in rows] == [["maskclip", "1", "2", "0.1", "-", "-", "50.0"]]
    assert len(paper) == 1 and "standard error" not in notes[0] and len(notes) == 2


def test_labels_are_what_differs_from_most(tmp_path):
    def labels(*runs):
        settings = [dict(method=method) | {name: str(x) for name, x in rest.items()} for method, rest in runs]
        return pictures.row_labels(settings)
    both = dict(mask="block", lr=0.1)
    assert labels(("clip", both), ("maskclip", both | dict(mask="random")), ("slip", both | dict(lr=0.3))) == (
        ["clip", "maskclip `--mask random`", "slip `--lr 0.3`"], 0)
    assert labels(("clip", both | dict(lr=3)), ("clip", both), ("mae", both), ("clip", both | dict(mask="random"))) == (
        ["clip `--lr 3`", "clip", "mae", "clip `--mask random`"], 1)
    assert labels(("mae", dict(lr=1, init="")), ("mae", dict(lr=2, init="a")))[0] == ["mae", "`--lr 2 --init a`"]
    assert labels(("mae", {}), ("mae", dict(init="a")), ("mae", dict(init="")))[0] == [
        "mae", "`--init a`", "`--init ''`"]
    assert labels(("clip", {}), ("mae", dict(init="a")), ("slip", dict(init="a")))[0] == [
        "clip `--init ?`", "mae", "slip"]
    save_run(tmp_path / "a", method="clip", lr=0.1)
    save_run(tmp_path / "b", method="clip", lr=0.1, seed=1, micro_batch=2, log_every=3, compile=True, root="elsewhere")
    save_run(tmp_path / "c", method="clip", lr=0.1, weight_decay=0.3)
    rows, _, _ = read(evaluate.compare([tmp_path / name for name in "cab"]))
    assert [(row[""], row["seeds"]) for row in rows] == [("clip", "1"), ("`--weight-decay 0.1`", "2")]


def test_settings_that_may_differ_are_train_s():
    loop = {field.name for field in dataclasses.fields(train.LoopConfig)}
    assert set(evaluate.FREE) == {"seed", *loop, *train.FREE} and len(set(evaluate.FREE)) == len(evaluate.FREE)


def test_what_the_notes_say(tmp_path):
    save_run(tmp_path / "a", {"linear x": {"top-1": 0.5}})
    save_run(tmp_path / "b", {"linear x": {"top-1": 0.7}, "dense y": {"mIoU": 0.2}})
    save_run(tmp_path / "c", seed=1)
    save_run(tmp_path / "d", method="mae", epoch=1.5, log=[(10, 1)])
    state = torch.load(tmp_path / "c/last.pt")
    torch.save(state | dict(pairs="639 pairs, 1", made_by={}), tmp_path / "c/last.pt")
    (tmp_path / "c/log.jsonl").unlink()
    rows, _, notes = read(evaluate.compare([tmp_path / name for name in "abcd"]))
    assert list(rows[0].values()) == ["clip", "3", "-", "-", "-", "-", per_cent([0.5, 0.7]), "20.0"]
    assert list(rows[1].values()) == ["mae", "1", "1.5", f"{20 * 64 / 10 / 60:.1f}", "-", "-", "-", "-"]
    assert notes[1:] == [
        "commits: clip aaaaaaa, unknown; mae aaaaaaa", "clip: 2 runs have seed 0: these are no independent seeds",
        "clip: the runs saw different data: 640 pairs, 0; 639 pairs, 1", "clip: 2 of 3 runs have linear x top-1",
        "clip: 1 of 3 runs have dense y mIoU", f"{tmp_path}/d is not at its end: 7 steps are left",
        f"no scores of these weights yet: python evaluate.py --checkpoint {tmp_path}/c/last.pt {tmp_path}/d/last.pt "
        "--zeroshot ... --linear ... --retrieval ..."]


def test_a_column_is_one_protocol(tmp_path):
    """train.py and evaluate.py call a set by other names; a fitted penalty is no protocol; other features are."""
    def record(task, score, place="/x/OUT/val", **protocol):
        return dict(task=task, scores={"top-1": score}, chance=0, protocol=dict(place=place, **protocol))
    records = [[record("linear OUT", 0.1, penalty=1, features="cls"),
                record("linear /x/OUT/val", 0.1, penalty=1, features="cls", set="x"),
                record("linear OUT", 0.2, penalty=2, features="both")],
               [record("linear OUT", 0.6, penalty=2, features="both"), record("linear OUT", 0.7, penalty=2),
                record("linear OUT", 0.5, "/y/OUT/val", penalty=3, features="cls"),
                record("linear /z/OUT/val", 0.9, "/z/OUT/val", penalty=4, features="cls")]]
    for name, own in zip("ab", records):
        folder = save_run(tmp_path / name, seed=ord(name))
        digest = evaluate.Cache(folder / "last.pt").sha256
        (folder / "results.json").write_text(json.dumps([one | dict(sha256=digest) for one in own]))
    (row,), _, notes = read(evaluate.compare([tmp_path / "a", tmp_path / "b"]))
    assert dict(list(row.items())[6:]) == {
        "linear OUT top-1": per_cent([0.1, 0.5]), "linear OUT (features both) top-1": per_cent([0.2, 0.6]),
        "linear OUT (no features) top-1": "70.0",
        "linear OUT top-1 (/z/OUT/val)": "90.0"}
    assert "linear OUT was measured at /x/OUT/val and /y/OUT/val and /z/OUT/val" in notes


@pytest.mark.parametrize("words,why", [
    (["--compare", "empty"], "empty is no run: it has neither last.pt nor log.jsonl"),
    (["--compare", "a", "young"], "young has no last.pt yet"), (["--compare", "torn"], "last.pt is not a checkpoint"),
    (["--compare", "tuned"], "tuned is no run of train.py"),
    (["--compare", "odd"], "log.jsonl is damaged in line 2"), (["--compare", "lost"], "was not written by evaluate.py"),
    *((["--compare", "a", *other], "--compare takes folders of runs and prints a table") for other in (
        ["--output", "x"], ["--checkpoint", "a/last.pt"], ["--report", "a"], ["--zeroshot", "x"]))])
def test_one_sentence(words, why, tmp_path, monkeypatch, capsys):
    for name in ("a", "young", "torn", "odd", "lost", "tuned"):
        save_run(tmp_path / name)
    state = torch.load(tmp_path / "tuned/last.pt")
    del state["config"]["method"]
    torch.save(state, tmp_path / "tuned/last.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "young/last.pt").unlink()
    (tmp_path / "torn/last.pt").write_bytes(b"torn")
    lines = (tmp_path / "odd/log.jsonl").read_text().splitlines()
    (tmp_path / "odd/log.jsonl").write_text("\n".join([lines[0], lines[1][:9], lines[2]]))
    (tmp_path / "lost/results.json").write_text("[")
    monkeypatch.chdir(tmp_path)
    sentence = answer(evaluate.main, words, monkeypatch, capsys)
    assert why in sentence and (len(words) > 3 or sentence.strip().count("\n") == 0)


def test_a_log_without_a_speed_gives_no_cost(tmp_path):
    save_run(tmp_path / "a", log=((0.0, 1.0), (None, 2.0), (100, None)))
    (row,), _, _ = read(evaluate.compare([tmp_path / "a"]))
    assert list(row.values())[1:6] == ["1", "-", "-", "-", "-"]


def test_the_command_prints_it_and_a_log_may_end_in_the_middle_of_a_line(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "a")
    with open(tmp_path / "a/log.jsonl", "a") as file:
        file.write('{"step": 3')
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--compare", str(tmp_path / "a")])
    evaluate.main()
    assert capsys.readouterr().out == evaluate.compare([tmp_path / "a"]) + "\n"
