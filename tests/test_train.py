"""The loop: recipes, schedules, resume, two ranks, signals, and what a user may give it that is wrong."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import model as models
import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """64 pairs of the demo world."""
    folder = tmp_path_factory.mktemp("pairs")
    data._draw_shard(folder, 0, 64, 0)
    return folder


def small(shards, out, **changes):
    """A run of 8 steps of 8 pairs."""
    return train.resolve(dict(data=[str(shards)], out=str(out), epochs=1, batch_size=8, workers=0, log_every=1,
                              vocab_size=600) | changes)


def lines(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses_of(out):
    return [{k: v for k, v in line.items() if k not in ("seen_per_s", "lr", "epoch", "bad")} for line in lines(out)]


def start(command, *args, **kwargs):
    """A program of ours as a user starts it."""
    return subprocess.Popen([sys.executable, *command, *map(str, args)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1"), **kwargs)


# ---------------------------------------------------------------- settings and schedules

def test_recipes_by_data_and_method():
    assert train.resolve({}).model == "tiny" and train.resolve({}).out == "runs/demo-maskclip"
    yfcc = train.resolve(dict(data=["yfcc15m"]))
    assert (yfcc.model, yfcc.batch_size, yfcc.epochs, yfcc.lr, yfcc.vocab_size) == ("vit_b16", 4096, 25, 5e-4, 0)
    assert train.resolve(dict(data=["cc3m"], method="slip")).lr == 3e-3
    assert train.resolve(dict(data=["cc3m"], method="slip", lr=1.0)).lr == 1.0  # what is given wins
    assert train.resolve(dict(data=["/x/train"])).model == "tiny"
    assert train.resolve(dict(data=["/x/train"], model="vit_s16")).batch_size == 4096  # cc3m's recipe
    assert train.resolve(dict(data=["/x/train"])).out == "runs/x-train-maskclip"


@pytest.mark.parametrize("given,sentence", [
    (dict(method="clop"), "unknown --method 'clop': one of clip, slip"), (dict(model="vit"), "unknown --model 'vit'"),
    (dict(mask="half"), "unknown --mask"), (dict(precision="int8"), "unknown --precision"),
    (dict(mask_ratio=75.0), "--mask-ratio must be at least 0.01 and at most 0.99, not 75"),
    (dict(seed=-1), "--seed must"), (dict(mlm_ratio=2.0), "--mlm-ratio"),
    (dict(crop_min=0.0), "--crop-min"), (dict(steps=-3), "--steps must be"),
    (dict(epochs=0), "--epochs must be at least 1"), (dict(batch_size=-8), "--batch-size must be at least 1")])
def test_settings_that_cannot_be_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        train.resolve(given)


def test_schedules_by_hand():
    config = train.resolve(dict(data=["cc3m"], epochs=10, ema_start=0.9, ema_end=1.0))  # a warm-up of one epoch
    rate = [train.learning_rate(step, config, 100) for step in (0, 50, 100, 550, 1000)]
    assert rate == pytest.approx([1e-6, (1e-6 + 5e-4) / 2, 5e-4, (5e-4 + 1e-5) / 2, 1e-5])
    assert [train.ema_momentum(step, config, 100) for step in (0, 500, 1000)] == pytest.approx([0.9, 0.95, 1.0])


def test_weight_decay_is_for_matrices_alone():
    model = models.build(models.ModelConfig(**{**vars(models.PRESETS["tiny"])}))
    decay, other = train.parameter_groups(model, 0.3)
    assert decay["weight_decay"] == 0.3 and other["weight_decay"] == 0
    assert len(decay["params"]) + len(other["params"]) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] or "logit_scale" in names[id(p)]
               for p in other["params"])


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("method", models.METHODS)
def test_every_method_trains_logs_and_loads(shards, tmp_path, method):
    config = small(shards, tmp_path, method=method, epochs=2)
    train.run(config)
    log = lines(tmp_path)
    assert [line["step"] for line in log] == list(range(1, 17)) and log[-1]["epoch"] == 2
    terms = dict(clip=["image", "text"], slip=["image", "text", "simclr"], clip_mae=["image", "text", "pixel"],
                 maskclip=["image", "text", "distill", "mlm"], simclr=["simclr"], mae=["pixel"])[method]
    assert all(math.isfinite(line[term]) for line in log for term in terms)
    assert sum(log[-1][term] for term in terms) < sum(log[0][term] for term in terms)
    model, tokenizer = evaluate.load_model(tmp_path / "last.pt")
    assert model.config.method == method and (tokenizer is None) == (method in ("simclr", "mae"))
    assert not model.training
    if tokenizer:
        assert model.encode_text(tokenizer(["a red star", "x"])).shape == (2, model.config.embed_dim)


def test_overfits_16_pairs_to_zero_shot_100(tmp_path):
    """Sixteen pictures of sixteen classes, learned by heart, are told apart by their class names."""
    names = data.CLASSES[::2][:16]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, name in enumerate(names):
            picture = data.draw_scene(np.random.default_rng(i), 1, [name])[0]
            (tmp_path / "test" / name).mkdir(parents=True)
            picture.save(tmp_path / "test" / name / "0.png")
            data.add_member(tar, f"{i}.png", (tmp_path / "test" / name / "0.png").read_bytes())
            data.add_member(tar, f"{i}.txt", name.encode())
    (tmp_path / "test/templates.txt").write_text("{}\n")
    train.run(small(tmp_path, tmp_path / "run", epochs=80, batch_size=16, lr=1e-3, crop_min=0.9, log_every=20))
    result = evaluate.zeroshot(*evaluate.load_model(tmp_path / "run/last.pt"), tmp_path / "test")
    assert result["scores"]["top-1"] == 1.0


def test_four_steps_are_two_and_two_bit_for_bit(shards, tmp_path):
    train.run(small(shards, tmp_path / "whole", steps=4))
    train.run(small(shards, tmp_path / "parts", steps=2))
    train.run(small(shards, tmp_path / "parts", steps=4))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "teacher"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    assert one["teacher"]["center"].abs().sum() > 0


@pytest.mark.parametrize("method", ["maskclip", "slip"])
def test_two_ranks_equal_one(shards, tmp_path, method):
    train.run(small(shards, tmp_path / "one", method=method, steps=4))
    run = start(["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d",
                 "--rdzv-endpoint=localhost:0"], "train.py", "--data", shards, "--out", tmp_path / "two", "--method",
                method, "--epochs", 1, "--batch-size", 8, "--workers", 0, "--log-every", 1, "--vocab-size", 600,
                "--steps", 4)
    assert run.wait(120) == 0, run.stderr.read()
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two"))
    for name, p in one["model"].items():
        other = two["model"][name]
        if name.endswith("qkv.bias"):  # a key's bias does nothing; its gradient is rounding, scaled up by Adam
            p, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (p, other))
        assert torch.allclose(p, other, atol=1e-4), name
    for a, b in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_same_folder_with_other_settings_is_refused(shards, tmp_path):
    train.run(small(shards, tmp_path, steps=1))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="--lr 0.001 there, 0.5 now.*give another --out"):
        train.run(small(shards, tmp_path, lr=0.5))
    assert (tmp_path / "last.pt").read_bytes() == before


def test_more_shards_than_before_are_refused(shards, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(shards, folder)
    train.run(small(folder, tmp_path / "run", steps=1))
    shutil.copy(folder / "00000.tar", folder / "00001.tar")
    with pytest.raises(ValueError, match=r"was another .*\(64 pairs.* then, 128 pairs.* now\)"):
        train.run(small(folder, tmp_path / "run"))


def test_resume_from_a_path(shards, tmp_path):
    train.run(small(shards, tmp_path / "a", steps=2))
    train.run(small(shards, tmp_path / "b", resume=str(tmp_path / "a/last.pt"), steps=3))
    assert [line["step"] for line in lines(tmp_path / "b")] == [3]
    with pytest.raises(ValueError, match="would overwrite the run in"):
        train.run(small(shards, tmp_path / "b", resume=str(tmp_path / "a/last.pt"), steps=3))
    with pytest.raises(FileNotFoundError):
        train.run(small(shards, tmp_path / "c", resume=str(tmp_path / "none.pt")))


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(shards, tmp_path, monkeypatch):
    train.run(small(shards, tmp_path, steps=2))
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(train.losses, "mlm_loss", lambda logits, targets: logits.sum() * math.nan)
    with pytest.raises(ValueError, match="not finite at step 8.*last.pt is good"):
        train.run(small(shards, tmp_path, log_every=100))
    assert (tmp_path / "last.pt").read_bytes() == before


def test_shards_in_val_do_not_fail_a_trained_run(shards, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.copytree(shards, tmp_path / part)
    train.run(small(tmp_path / "train", tmp_path / "run"))
    assert "retrieval not evaluated: no karpathy.json" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_the_same_command_goes_on(shards, tmp_path, number):
    command = ["train.py", "--data", shards, "--out", tmp_path, "--epochs", 3, "--batch-size", 8, "--log-every", 1,
               "--workers", 2]
    run = start(command[:1], *command[1:], start_new_session=True)
    for _ in range(600):
        if (tmp_path / "log.jsonl").is_file() and len(lines(tmp_path)) >= 2:
            break
        time.sleep(0.1)
    os.killpg(run.pid, number)  # the loader's workers too, as Ctrl-C and schedulers do
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0 and f"{number.name}: stopped after step" in out and "goes on" in out, err
    done = lines(tmp_path)[-1]["step"]
    assert done < 24
    run = start(command[:1], *command[1:])
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0 and f"going on from step {done}" in out, err
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 25))


def test_bad_pairs_are_counted_in_the_log(tmp_path):
    data._draw_shard(tmp_path, 0, 24, 0)
    content = bytearray((tmp_path / "00000.tar").read_bytes())
    content[512:700] = bytes(188)  # the first picture
    (tmp_path / "00000.tar").write_bytes(content)
    train.run(small(tmp_path, tmp_path / "run"))
    assert lines(tmp_path / "run")[-1]["bad"] == 1
    named = [name for line in lines(tmp_path / "run") for name in line.get("bad_pairs", ())]
    assert len(named) == 1 and "00000.tar at byte" in named[0]


@pytest.mark.parametrize("what", ["an error", "a killed worker"])
def test_a_run_ends_when_its_workers_do(tmp_path, what):
    """What a loader's worker raises, or its death, must not leave a process that waits for ever."""
    data._draw_shard(tmp_path, 0, 64, 0)
    if what == "an error":
        content = bytearray((tmp_path / "00000.tar").read_bytes())
        for row in data.Pairs([str(tmp_path)]).sources[0].rows:
            content[row["image"]:row["image"] + 30] = bytes(30)
        (tmp_path / "00000.tar").write_bytes(content)
    run = start(["train.py"], "--data", tmp_path, "--out", tmp_path / "run", "--workers", 2, "--batch-size", 8,
                "--epochs", 500, "--vocab-size", 600)
    if what == "a killed worker":
        while not (tmp_path / "run/log.jsonl").is_file() or not lines(tmp_path / "run"):
            time.sleep(0.1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and ("20 bad pairs in a row" if what == "an error" else "killed by signal") in error


def test_too_many_bad_pairs_stop_the_run_and_check_lets_it_go_on(tmp_path):
    """A third of 90 pairs is spoilt: the run ends with the way out, and `data.py check` is it."""
    data._draw_shard(tmp_path, 0, 90, 0)
    pairs = data.Pairs([str(tmp_path)])
    content = bytearray((tmp_path / "00000.tar").read_bytes())
    for row in pairs.sources[0].rows[::3]:
        content[row["image"]:row["image"] + 30] = bytes(30)
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(ValueError, match="were bad, more than --bad-limit 0.01: .* python data.py check"):
        train.run(small(tmp_path, tmp_path / "run", epochs=9))
    bad = lines(tmp_path / "run")[-1]["bad"]  # written with the last step that was well, if any
    train.run(small(tmp_path, tmp_path / "more", steps=4, bad_limit=0.9))
    assert lines(tmp_path / "more")[-1]["bad"] > 5 and bad <= 20
    assert len(data.check(data.Pairs([str(tmp_path)]))) == 30
    train.run(small(tmp_path, tmp_path / "skipped", steps=4))
    assert lines(tmp_path / "skipped")[-1]["bad"] == 0


# ---------------------------------------------------------------- what a user may type

def answer(main, arguments, monkeypatch, capsys):
    """What a command line ends with: the sentence, and an exit status that is not 0."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code not in (0, None)
    sentence = f"{end.value.code} {capsys.readouterr().err}"
    assert "Traceback" not in sentence
    return sentence


@pytest.mark.parametrize("arguments,sentence", [
    (["--speed", "9"], "unrecognized arguments: --speed"),
    (["--method", "clop"], "unknown --method 'clop'"),
    (["--data", "cc3m"], "no data set 'cc3m': looked for"),
    (["--data", "/nowhere/at/all"], "no data set '/nowhere/at/all'"),
    (["--data", "EMPTY"], "no data set"),
    (["--data", "SHARDS", "--batch-size", "9999"], "64 pairs are fewer than one global batch"),
    (["--data", "SHARDS", "--resume", "none.pt"], "none.pt"),
    (["--data", "SHARDS", "--vocab-size", "9"], "vocab_size 9 is below 515"),
    (["--data", "SHARDS", "--epochs", "many"], "invalid int value: 'many'")])
def test_train_answers_bad_input_with_one_sentence(shards, tmp_path, arguments, sentence, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    places = dict(SHARDS=shards, EMPTY=tmp_path / "empty")
    arguments = [places.get(a, a) for a in arguments] + ["--root", tmp_path, "--out", tmp_path / "run"]
    assert sentence in answer(train.main, arguments, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def checkpoint(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.run(small(shards, out, steps=1, method="clip"))
    return out / "last.pt"


@pytest.mark.parametrize("arguments,sentence", [
    ([], "nothing to do"), (["--zeroshot", "x", "--speed", "1"], "unrecognized arguments"),
    (["--zeroshot", "demo", "--checkpoint", "none.pt"], "No such file"),
    (["--zeroshot", "imagenet"], "no test set 'imagenet'"),
    (["--retrieval", "EMPTY"], "no karpathy.json"), (["--dense", "EMPTY"], "no classes.txt"),
    (["--zeroshot", "EMPTY"], "no class folders"), (["--linear", "EMPTY"], "no class folders"),
    (["--heatmap", "model.py", "a dog"], "cannot read the picture model.py")])
def test_evaluate_answers_bad_input_with_one_sentence(checkpoint, tmp_path, arguments, sentence, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(ROOT)
    arguments = ["--checkpoint", checkpoint, "--root", tmp_path,
                 *(tmp_path / "empty" if a == "EMPTY" else a for a in arguments)]
    assert sentence in answer(evaluate.main, arguments, monkeypatch, capsys)


def test_a_shell_sees_the_sentence_and_the_status():
    run = start(["train.py"], "--method", "clop")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1 and out == "" and err.startswith("train.py: error: unknown --method 'clop'")
    assert err.count("\n") == 1
