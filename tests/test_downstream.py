"""Fine-tuning and segmentation: each piece against a naive one or timm's, runs that go on bit for bit, bad input."""
import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model as models
import train
from downstream import finetune, segment

ROOT = Path(__file__).parent.parent
TINY = models.PRESETS["tiny"]


def rng_of(*seed):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Class folders, labelled pictures, and a checkpoint of a run of four steps."""
    folder = tmp_path_factory.mktemp("world")
    for split, count in (("train", 8), ("test", 4)):
        for c, name in enumerate(("red star", "blue circle")):
            (folder / "classes" / split / name).mkdir(parents=True)
            for i in range(count):
                picture = data.draw_scene(rng_of(count, c, i), 1, [name])[0]
                picture.save(folder / "classes" / split / name / f"{i}.png")
    for part in ("images", "labels"):
        (folder / "pixels" / part).mkdir(parents=True)
    (folder / "pixels/classes.txt").write_text("\n".join(data.CLASSES) + "\n")
    for i in range(10):
        picture, label, _, _ = data.draw_scene(rng_of(7, i), 2, data.CLASSES)
        picture.save(folder / f"pixels/images/{i}.png")
        label.save(folder / f"pixels/labels/{i}.png")
    (folder / "train").mkdir()
    data._draw_shard(folder / "train", 0, 64, 0)
    train.run(train.parse(["--data", str(folder / "train"), "--out", str(folder / "run"), "--batch-size", "8",
                           "--workers", "0", "--vocab-size", "600", "--steps", "4", "--method", "clip"]))
    return folder


def tune(world, out, *more, kind=finetune, **changes):
    """A run in this process."""
    given = dict(data=world / ("classes" if kind is finetune else "pixels"), out=out, epochs=4, batch_size=4, workers=0,
                 log_every=1, checkpoint=world / "run/last.pt") | changes
    words = [str(word) for name, value in given.items() if value is not None
             for word in ("--" + name.replace("_", "-"), value)]
    train.run(kind.parse([*words, *more]), kind.open_run)


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- layers, positions, stochastic depth

def test_each_parameter_learns_at_the_rate_of_its_layer():
    model = finetune.Classifier(replace(TINY, depth=4, pre_norm=True), 5)
    config = finetune.TuneConfig(layer_decay=0.5, weight_decay=0.3)
    groups = finetune.parameter_groups(model, config)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        scale = 0.5 ** 5
        for i in range(4):
            scale = 0.5 ** (4 - i) if name.startswith(f"visual.blocks.{i}.") else scale
        scale = 1.0 if name.startswith(("head", "visual.norm.")) else scale
        assert found[id(p)]["scale"] == scale, name
        decays = name.endswith("weight") and "norm" not in name
        assert found[id(p)]["weight_decay"] == (0.3 if decays else 0), name


def test_positions_are_resized_as_a_grid():
    positions = torch.randn(1, 1 + 16, 8)
    assert finetune.resized_positions(positions, 4) is positions
    larger = finetune.resized_positions(positions, 8)
    assert larger.shape == (1, 65, 8) and larger[:, 0].equal(positions[:, 0])
    plane = torch.arange(4.0)[:, None] * 10 + torch.arange(4.0)  # rows and columns told apart
    plane = torch.cat([torch.zeros(1), plane.flatten()]).view(1, 17, 1)
    inner = finetune.resized_positions(plane, 8)[0, 1:, 0].view(8, 8)[3:5, 3:5]
    torch.testing.assert_close(inner, torch.tensor([[13.75, 14.25], [18.75, 19.25]]), atol=0.6, rtol=0)


def test_stochastic_depth_leaves_pictures_out_and_keeps_the_mean():
    block = models.Block(8, 2)
    branch = torch.ones(4000, 3, 8)
    assert block.dropped(branch) is branch
    block.drop_path = 0.25
    torch.manual_seed(0)
    out = block.dropped(branch)
    assert out.flatten(1).std(1).max() == 0 and out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(out.mean() - 1) < 0.03
    assert block.eval().dropped(branch) is branch


def test_recomputed_blocks_leave_out_the_same_pictures():
    x, gradients = torch.randn(16, 5, 8), []
    block = models.Block(8, 2)
    block.drop_path = 0.5
    for block.recompute in (False, True):
        torch.manual_seed(1)
        block.zero_grad()
        block(x).square().sum().backward()
        gradients.append(block.attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_stochastic_depth_grows_over_the_blocks(world):
    config = finetune.TuneConfig(checkpoint=str(world / "run/last.pt"), drop_path=0.2)
    model = finetune.build(config, lambda shape: finetune.Classifier(shape, 2))
    assert [block.drop_path for block in model.visual.blocks] == pytest.approx([0, 0.1, 0.2])


def test_the_tower_is_the_checkpoints_and_the_head_begins_small(world):
    trained = evaluate.load_model(world / "run/last.pt")[0].visual.state_dict()
    config = finetune.TuneConfig(checkpoint=str(world / "run/last.pt"))
    model = finetune.build(config, lambda shape: finetune.Classifier(shape, 2))
    assert all(x.equal(trained[name]) for name, x in model.visual.state_dict().items())
    assert model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()
    fresh = finetune.build(replace(config, scratch=True, model="tiny"), lambda shape: finetune.Classifier(shape, 2))
    assert not fresh.visual.blocks[0].attn.qkv.weight.equal(trained["blocks.0.attn.qkv.weight"])
    assert fresh.head.weight.std() > 0.01 and fresh.config.method == "deit"
    larger = finetune.build(replace(config, image_size=96), lambda shape: finetune.Classifier(shape, 2))
    assert larger(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


# ---------------------------------------------------------------- pictures and labels

@pytest.mark.parametrize("name", list(finetune.OPERATIONS))
def test_operations_grow_with_the_magnitude(name):
    image = data.draw_scene(rng_of(3), 3, data.CLASSES)[0].resize((80, 64))
    changes = []
    for m in (0.05, 0.5, 1.0):
        out = finetune.OPERATIONS[name](image, m, rng_of(0))
        assert out.size == (80, 64) and out.mode == "RGB"
        changes.append(np.abs(np.asarray(out, float) - np.asarray(image)).mean())
    assert changes[2] > 0 and changes[0] <= changes[2]


def test_erased_boxes_have_the_areas_of_the_paper():
    boxes = [finetune.erased_box(64, 48, rng_of(i)) for i in range(2000)]
    assert all(0 <= top and top + h <= 64 and 0 <= left and left + w <= 48 for top, left, h, w in boxes)
    shares = np.array([h * w / (64 * 48) for _, _, h, w in boxes])
    assert 0.015 < shares.min() < 0.03 and 0.30 < shares.max() < 0.35 and 0.14 < shares.mean() < 0.18
    assert finetune.erased_box(64, 1, rng_of(0)) is None


def test_a_picture_is_drawn_from_seed_epoch_and_number(world):
    tests = data.test_set(str(world / "classes"), split="train")
    config = finetune.TuneConfig(erase=1.0)
    samples = finetune.Labelled(tests, config, 64)
    first, again, next_epoch = samples[0, 3], samples[0, 3], samples[1, 3]
    assert first["images"].equal(again["images"]) and not first["images"].equal(next_epoch["images"])
    assert first["images"].shape == (64, 64, 3) and first["labels"] == tests.targets[3]
    plain = finetune.Labelled(tests, replace(config, erase=0.0), 64)[0, 3]["images"]
    changed = (plain != first["images"]).any(2)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    box = changed[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    assert box.float().mean() > 0.9 and 0.01 < changed.float().mean() < 0.36  # one rectangle, all noise


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixtures_have_the_labels_of_their_pixels(kind, seed):
    config = finetune.TuneConfig(mixup=0.8 * (kind == "mixup"), cutmix=1.0 * (kind == "cutmix"), smoothing=0.1)
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).repeat(1, 3, 20, 30), torch.tensor([0, 1, 2, 2])
    mixed, targets = finetune.mix(images, labels, 3, config, rng_of(seed))
    own = torch.full((4, 3), 0.1 / 3)
    for row, label in zip(own, labels):
        row[label] += 0.9
    for i in range(4):  # picture i is i everywhere, its partner 3 - i
        other = (mixed[i, 0] - i) / (3 - 2 * i)
        assert kind == "mixup" or set(other.unique().tolist()) <= {0.0, 1.0}
        share = other.mean().item()
        torch.testing.assert_close(targets[i], (1 - share) * own[i] + share * own[3 - i], atol=1e-5, rtol=0)


def test_half_of_the_batches_are_cut():
    config, images = finetune.TuneConfig(), torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    labels = torch.zeros(2, dtype=torch.long)
    mixtures = [finetune.mix(images.clone(), labels, 1, config, rng_of(i))[0] for i in range(2000)]
    cut = [set(mixed.unique().tolist()) <= {0.0, 1.0} for mixed in mixtures]
    assert 0.47 < np.mean(cut) < 0.53
    plain = replace(config, mixup=0.0, cutmix=0.0, smoothing=0.0)
    out, targets = finetune.mix(images, torch.tensor([1, 0]), 2, plain, rng_of(0))
    assert out is images and targets.equal(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


# ---------------------------------------------------------------- runs

def same_run(world, tmp_path, kind, *more, **changes):
    """A run of four steps equals one of two that goes on, in every bit of its checkpoint and log."""
    tune(world, tmp_path / "whole", *more, kind=kind, steps=4, **changes)
    tune(world, tmp_path / "parts", *more, kind=kind, steps=2, **changes)
    tune(world, tmp_path / "parts", *more, kind=kind, steps=4, **changes)
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "teacher") if changes.get("ema") else ("model",):
        assert all(x.equal(parts[part][name]) for name, x in whole[part].items())
    for number, moments in whole["optimizer"]["state"].items():
        assert moments["exp_avg"].equal(parts["optimizer"]["state"][number]["exp_avg"])
    logs = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("whole", "parts")]
    assert len(logs[0]) == 4 and logs[0] == logs[1]


def test_fine_tuning_goes_on_bit_for_bit(world, tmp_path):
    same_run(world, tmp_path, finetune, drop_path=0.3, mixup=0.8, magnitude=9, erase=0.5, ema=0.9)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_segmentation_goes_on_bit_for_bit(world, tmp_path, head):
    same_run(world, tmp_path, segment, head=head, batch_size=2, drop_path=0.3 * (head == "upernet"))


def test_fine_tuning_learns_and_writes_what_it_found(world, tmp_path, capsys):
    tune(world, tmp_path, epochs=12, mixup=0, cutmix=0, magnitude=0, eval_every=6, lr=3e-3)
    lines = log_of(tmp_path)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"] and lines[-1]["lr"] < 1e-4 < lines[10]["lr"]
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["task"] == f"finetune {world / 'classes'}" and record["protocol"]["config"]["epochs"] == 12
    assert record["scores"]["accuracy"] == lines[-1]["finetune"] >= 0.75
    assert (tmp_path / "best.pt").is_file() and "accuracy" in capsys.readouterr().out
    before = (tmp_path / "last.pt").read_bytes()
    tune(world, tmp_path, epochs=12, mixup=0, cutmix=0, magnitude=0, eval_every=6, lr=3e-3)  # finished: evaluated again
    assert (tmp_path / "last.pt").read_bytes() == before
    assert f"{100 * record['scores']['accuracy']:.1f}" in capsys.readouterr().out


def test_a_moving_average_is_kept_and_is_what_is_evaluated(world, tmp_path):
    config = segment.parse(["--data", str(world / "pixels"), "--checkpoint", str(world / "run/last.pt"), "--ema", "0.8",
                            "--batch-size", "2", "--workers", "0", "--epochs", "2", "--out", str(tmp_path)])
    run = segment.open_run(config, train.join(1))
    batches = run.batches(3)
    average = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(3):
        run.advance(next(batches))
        average = {name: 0.8 * average[name] + 0.2 * p.detach() for name, p in run.model.named_parameters()}
    for name, p in run.teacher.named_parameters():
        torch.testing.assert_close(p, average[name])
    for name, x in run.teacher.named_buffers():  # batch norm's statistics are the newest
        assert x.equal(dict(run.model.named_buffers())[name]), name
    asked = []
    run.measure = asked.append
    run.evaluate()
    assert asked == [run.teacher] and not run.teacher.training


def test_each_step_sets_the_rates_of_its_layers(world, tmp_path):
    config = finetune.parse(["--data", str(world / "classes"), "--checkpoint", str(world / "run/last.pt"), "--workers",
                             "0", "--batch-size", "4", "--epochs", "4", "--warmup-epochs", "1", "--out", str(tmp_path)])
    run = finetune.open_run(config, train.join(1))
    batches = run.batches(6)
    for step in range(6):
        run.model.eval()  # as an evaluation leaves it
        lr = run.advance(next(batches))[3]["lr"]
        assert run.model.training
        wanted = 1e-6 + (2e-3 - 1e-6) * step / 4 if step < 4 else (
            1e-6 + (2e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 4) / 12)) / 2)
        assert lr == pytest.approx(wanted)
        for group in run.optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr * group["scale"])
    assert {group["scale"] for group in run.optimizer.param_groups} == {0.5 ** n for n in range(5)}


def test_a_frozen_tower_stays_what_it_is(world, tmp_path):
    tune(world, tmp_path, kind=segment, head="linear", batch_size=2, steps=3)
    trained = evaluate.load_model(world / "run/last.pt")[0].visual.state_dict()
    state = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert all(x.equal(state[f"visual.{name}"]) for name, x in trained.items())
    fresh = finetune.build(segment.SegmentConfig(checkpoint=str(world / "run/last.pt"), image_size=64),
                           lambda shape: segment.Linear(shape, 42))
    assert not state["conv_seg.weight"].equal(fresh.conv_seg.weight)
    assert [len(group["params"]) for group in finetune.parameter_groups(fresh, segment.SegmentConfig())] == [1, 1]


def test_upernet_learns_and_scores(world, tmp_path):
    tune(world, tmp_path, kind=segment, batch_size=2, epochs=6, eval_every=6)
    lines = log_of(tmp_path)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and lines[-1]["auxiliary"] < lines[0]["auxiliary"]
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["scores"]["mIoU"] == lines[-1]["segment"] and record["protocol"]["pictures"] == 2
    assert "every fifth picture is a test picture" in record["remarks"][0]
    assert Image.open(tmp_path / "predictions.png").width > 500
    page = (tmp_path / "report.html").read_text()
    assert "mIoU" in page and page.count("data:image/png") == 1 and "layer_decay" in page


def test_a_sheet_that_cannot_be_written_is_a_warning(world, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")
    monkeypatch.setattr(segment.pictures, "save", full)
    tune(world, tmp_path, kind=segment, head="linear", batch_size=2, epochs=2)
    assert "report.html not written: No space left on device" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())[0]["task"].startswith("segment ")


@pytest.mark.parametrize("kind, changes, more, message", [
    (finetune, dict(data="nowhere"), (), "no train set 'nowhere'"),
    (finetune, dict(checkpoint="missing.pt"), (), "missing.pt"),
    (finetune, {}, ("--scratch",), "takes no --checkpoint"),
    (finetune, dict(image_size=60), (), "no multiple of the tower's patches of 8"),
    (finetune, dict(image_size=60, checkpoint=None), ("--scratch", "--model", "tiny"), "no multiple of the tower's"),
    (finetune, dict(model="tiny"), (), "--model is for --scratch"),
    (finetune, dict(warmup_epochs=4), (), "--warmup-epochs 4.0 leaves nothing of --epochs 4"),
    (finetune, dict(layer_decay=2), (), "--layer-decay must be at least 0 and at most 1"),
    (finetune, dict(magnitude=11), (), "--magnitude must be"),
    (segment, dict(data="nowhere"), (), "no segmentation set 'nowhere'"),
    (segment, dict(head="fpn"), (), "unknown --head 'fpn'"),
    (segment, dict(batch_size=1), (), "give a larger --batch-size"), (segment, dict(image_size=8), (), "is one patch"),
])
def test_what_cannot_be_is_said_in_a_sentence(world, tmp_path, kind, changes, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        tune(world, tmp_path / "out", *more, kind=kind, **changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_run(world, tmp_path):
    tune(world, tmp_path, steps=1)
    before = (tmp_path / "last.pt").read_bytes()
    for kind, changes, more, message in (
            (finetune, dict(lr=1.0), (), "--lr"), (segment, {}, (), "another kind of run"),
            (finetune, dict(checkpoint=world / "run/epoch-1.pt"), (), "--checkpoint"),
            (finetune, dict(checkpoint=world / "run/epoch-1.pt"), ("--force",), "--checkpoint")):
        with pytest.raises(ValueError, match=message):
            tune(world, tmp_path, *more, kind=kind, **changes)
    with pytest.raises(ValueError, match="another kind of run"):
        train.run(train.parse(["--data", str(world / "train"), "--out", str(tmp_path), "--batch-size", "8"]))
    assert (tmp_path / "last.pt").read_bytes() == before
    tune(world, tmp_path, steps=2, checkpoint=None)  # the run knows what it started from
    assert len(log_of(tmp_path)) == 2


@pytest.mark.parametrize("ema", [0, 0.5])
def test_a_fine_tuned_tower_is_a_checkpoint_too(world, tmp_path, ema):
    tune(world, tmp_path, steps=2, ema=ema)
    tuned = torch.load(tmp_path / "last.pt", weights_only=True)["teacher" if ema else "model"]
    model, tokenizer = evaluate.load_model(tmp_path / "last.pt")
    assert tokenizer is None and model.config.method == "vit" and model.remarks
    assert all(x.equal(tuned[f"visual.{name}"]) for name, x in model.visual.state_dict().items())


@pytest.mark.slow
def test_the_command_line_of_both(world, tmp_path):
    for name, part in (("finetune", "classes"), ("segment", "pixels")):
        def run(*more, name=name):
            return subprocess.run([sys.executable, str(ROOT / f"downstream/{name}.py"), *more], cwd=tmp_path, text=True,
                                  capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        done = run("--data", str(world / part), "--checkpoint", str(world / "run/last.pt"), "--steps", "1",
                   "--batch-size", "2", "--workers", "0", "--out", f"{name}-run")
        assert done.returncode == 0 and "stopped after --steps 1" in done.stdout, done.stderr
        done = run("--data", "nowhere", "--scratch")
        assert done.returncode == 1 and done.stderr.startswith(f"{name}.py: error: ") and "Traceback" not in done.stderr


def opened(world, out, kind, *more, **changes):
    """A run that is opened, and not yet begun."""
    given = dict(data=world / ("classes" if kind is finetune else "pixels"), checkpoint=world / "run/last.pt", out=out,
                 batch_size=4, epochs=4, workers=0) | changes
    words = [str(word) for name, value in given.items() if value is not None
             for word in ("--" + name.replace("_", "-"), value)]
    return kind.open_run(kind.parse([*words, *more]), train.join(1))


def test_pictures_are_tested_in_the_middle_at_256_224ths(world, tmp_path):
    run, seen = opened(world, tmp_path, finetune), []
    plain = run.model.forward
    run.model.forward = lambda images: seen.append(images) or plain(images)
    result = run.measure(run.model.eval())
    views = []
    for path in run.sets[1].pictures:
        image = Image.open(path).convert("RGB")
        assert image.width == image.height == 64  # 73 = 64 * 256 // 224
        views.append(np.asarray(image.resize((73, 73), Image.BICUBIC).crop((4, 4, 68, 68))))
    pixels = data.normalize(torch.from_numpy(np.stack(views)))
    torch.testing.assert_close(torch.cat(seen), pixels)
    right = plain(pixels).argmax(1) == run.sets[1].targets
    assert result["scores"] == {"accuracy": pytest.approx(right.float().mean().item()), "top-5": 1.0}


def test_the_loss_of_segmentation_equals_a_loop(world, tmp_path):
    run = opened(world, tmp_path, segment, batch_size=2)
    logits, auxiliary = torch.randn(2, 42, 64, 64), torch.randn(2, 42, 64, 64)
    labels = torch.randint(0, 42, (2, 64, 64))
    labels[:, 20:] = 255
    run.student = lambda images: (logits, auxiliary)
    terms = run.terms(dict(images=torch.zeros(2, 64, 64, 3, dtype=torch.uint8), labels=labels), None)
    for name, x, weight in (("loss", logits, 1.0), ("auxiliary", auxiliary, 0.4)):
        total, log = 0.0, x.double().log_softmax(1)
        for b, y, z in (labels != 255).nonzero().tolist():
            total -= log[b, labels[b, y, z], y, z].item()
        assert terms[name].item() == pytest.approx(weight * total / labels.numel(), rel=1e-5)


def test_a_picture_is_seen_at_the_crops_size_through_windows(world, tmp_path):
    run, seen = opened(world, tmp_path, segment, head="linear"), []

    class Model:
        config = run.model.config

        def __call__(self, images):  # class 0 where it is dark, else 1
            seen.append(images.shape[2:])
            light = images.mean(1, keepdim=True)
            return torch.cat([-light, light], 1)
    image = Image.new("L", (180, 90))
    image.paste(255, (90, 0, 180, 45))
    guess = run.guess(Model(), image.convert("RGB"))
    assert guess.shape == (90, 180)
    wanted = torch.zeros(90, 180, dtype=torch.long)
    wanted[:45, 90:] = 1
    assert (guess == wanted).float().mean() > 0.97
    assert seen == [(64, 64)] * 3  # 128 x 64 pixels, stride 42: 0, 42, 64


def test_colours_are_changed_as_by_hand():
    image = data.draw_scene(rng_of(11), 3, data.CLASSES)[0]
    seen = set()
    for seed in range(40):
        rng = rng_of(seed)
        early, x = rng.random() < 0.5, np.asarray(image, float)

        def contrast(x, rng=rng):
            return np.floor(np.minimum(255, x * rng.uniform(0.5, 1.5))) if rng.random() < 0.5 else x
        bright = rng.random() < 0.5
        if bright:
            x = np.trunc((x + rng.uniform(-32, 32)).clip(0, 255))
        x = contrast(x) if early else x
        hsv = np.asarray(Image.fromarray(x.astype(np.uint8)).convert("HSV"), int).copy()
        rich = rng.random() < 0.5
        if rich:
            hsv[..., 1] = np.floor(np.minimum(255, hsv[..., 1] * rng.uniform(0.5, 1.5)))
        turned = rng.random() < 0.5
        if turned:
            hsv[..., 0] = (hsv[..., 0] + rng.integers(-26, 27)) % 256
        x = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"), float)
        x = x if early else contrast(x)
        assert np.abs(np.asarray(segment.recoloured(image, rng_of(seed)), float) - x).max() <= 1, seed
        seen.add((early, bright, rich, turned))
    assert len(seen) > 12


def test_a_run_goes_on_from_an_older_checkpoint_and_from_moved_data(world, tmp_path):
    tune(world, tmp_path / "a", epochs=3)
    tune(world, tmp_path / "b", epochs=3, checkpoint=None, resume=tmp_path / "a/epoch-2.pt")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in "ab")
    assert all(x.equal(b["model"][name]) for name, x in a["model"].items())
    (tmp_path / "elsewhere").symlink_to(world / "classes")
    tune(world, tmp_path / "a", epochs=3, data=tmp_path / "elsewhere")
    (tmp_path / "a/epoch-2.pt").unlink()
    tune(world, tmp_path / "b", epochs=3, checkpoint=None, resume=tmp_path / "a/epoch-2.pt")  # last.pt comes from it
    (tmp_path / "b/last.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"older ones are .*epoch-3.pt: --resume one of them with --force"):
        tune(world, tmp_path / "b", epochs=3, checkpoint=None)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        tune(world, tmp_path / "c", checkpoint=None, resume=tmp_path / "none.pt")


def test_force_takes_the_new_settings(world, tmp_path):
    tune(world, tmp_path, steps=2)
    run = opened(world, tmp_path, finetune, "--force", layer_decay=0.3, weight_decay=0, ema=0.9)
    assert run.step == 2
    assert sorted({group["scale"] for group in run.optimizer.param_groups}) == pytest.approx(
        [0.3 ** n for n in (4, 3, 2, 1, 0)])
    assert not any(group["weight_decay"] for group in run.optimizer.param_groups)
    assert all(x.equal(dict(run.model.named_parameters())[name]) for name, x in run.teacher.named_parameters())


def test_other_classes_are_refused_even_by_force(world, tmp_path):
    tune(world, tmp_path / "run", kind=segment, head="linear", batch_size=2, steps=1)
    folder = tmp_path / "pixels"
    folder.mkdir()
    for part in ("images", "labels"):
        (folder / part).symlink_to(world / "pixels" / part)
    (folder / "classes.txt").write_text("\n".join([*data.CLASSES, "cloud"]) + "\n")
    for changes, message in ((dict(data=folder), "the classes were others"), (dict(head="upernet"), "--head linear")):
        with pytest.raises(ValueError, match=message):
            tune(world, tmp_path / "run", "--force", **(dict(kind=segment, head="linear", batch_size=2) | changes))
    (folder / "classes.txt").write_text("\n".join(map(str, range(255))))
    with pytest.raises(ValueError, match="names 255 classes: at most 254"):
        data.segmentation_set(folder)


def test_a_damaged_picture_is_named_in_one_sentence(world, tmp_path):
    for split in ("train", "test"):
        for name in ("red star", "blue circle"):
            (tmp_path / split / name).mkdir(parents=True)
            for file in (world / "classes" / split / name).iterdir():
                content = file.read_bytes()
                damaged = (split, name, file.name) == ("train", "red star", "3.png")
                (tmp_path / split / name / file.name).write_bytes(content[:len(content) // 2] if damaged else content)
    done = subprocess.run([sys.executable, finetune.__file__, "--data", str(tmp_path), "--checkpoint",
                           str(world / "run/last.pt"), "--workers", "1", "--batch-size", "4", "--out",
                           str(tmp_path / "out")], text=True, capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^finetune.py: error: cannot read the picture .*train/red star/3.png: ", done.stderr, re.M)


def on_two_ranks(world, out, kind, **changes):
    """A run under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = dict(data=world / ("classes" if kind is finetune else "pixels"), checkpoint=world / "run/last.pt", epochs=4,
                 batch_size=4, workers=0, log_every=1, eval_every=4, out=out) | changes
    words = [str(word) for name, value in given.items() for word in ("--" + name.replace("_", "-"), value)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}",
                           kind.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_ranks_score_the_weights_that_are_saved(world, tmp_path):
    on_two_ranks(world, tmp_path, segment)  # each has batch norm's statistics of its own
    scores = opened(world, tmp_path, segment, eval_every=4).evaluate()["segment"]["scores"]
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert scores == record["scores"] and scores["mIoU"] == log_of(tmp_path)[-1]["segment"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, changes", [(finetune, {}), (segment, dict(head="linear"))])
def test_two_ranks_learn_what_one_does(world, tmp_path, kind, changes):
    on_two_ranks(world, tmp_path / "two", kind, **changes)
    tune(world, tmp_path / "one", kind=kind, eval_every=4, **changes)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert one[-1][kind.__name__.rpartition(".")[2]] == two[-1][kind.__name__.rpartition(".")[2]]


# ---------------------------------------------------------------- segmentation

def test_scores_equal_a_naive_count_with_pixels_left_out():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (40, 30), generator=generator)
    label[label == 4] = 255
    label[0, :9] = 3
    guess = torch.randint(0, 3, (40, 30), generator=generator)  # class 3 is never guessed, and occurs
    classes, ious, right, seen = 6, [], 0, 0                    # classes 4 and 5 do not occur at all
    for c in range(classes):
        both = either = 0
        for row in range(40):
            for column in range(30):
                if label[row, column] != 255:
                    both += int(label[row, column] == c and guess[row, column] == c)
                    either += int(label[row, column] == c or guess[row, column] == c)
        if either:
            ious.append(both / either)
        right += both
    seen = int((label != 255).sum())
    scores = evaluate.segmentation_scores(evaluate.confusion_matrix(guess, label, classes))
    assert len(ious) == 4 and 0.0 in ious
    assert scores["mIoU"] == pytest.approx(np.mean(ious)) and scores["pixel accuracy"] == pytest.approx(right / seen)


@pytest.mark.parametrize("height, width", [(8, 8), (5, 8), (8, 21), (13, 9), (30, 17)])
def test_windows_cover_a_picture_and_are_averaged(height, width):
    images, seen = torch.randn(1, 3, height, width), []

    def model(window):  # each window has its own answer
        assert window.shape[2:] == (8, 8)
        seen.append(window)
        return torch.full((1, 2, 8, 8), float(len(seen)))
    out = segment.slide(model, images, 8, 5)
    total, count, number = torch.zeros(height, width), torch.zeros(height, width), 0
    for i in range(max(height - 8 + 4, 0) // 5 + 1):  # mmsegmentation's grid
        for j in range(max(width - 8 + 4, 0) // 5 + 1):
            bottom, right = min(5 * i + 8, max(height, 8)), min(5 * j + 8, max(width, 8))
            number += 1
            total[bottom - 8:bottom, right - 8:right] += number
            count[bottom - 8:bottom, right - 8:right] += 1
    assert number == len(seen) and out.shape == (1, 2, height, width)
    torch.testing.assert_close(out[0, 0], total / count)


def test_crops_avoid_what_is_all_of_one_class_and_mark_what_is_missing():
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 1
    image, label = Image.new("RGB", (40, 40), "white"), Image.fromarray(label)
    most = [np.bincount(np.asarray(segment.random_crop(image, label, 16, rng_of(i))[1]).ravel()).max() / 256
            for i in range(200)]
    assert np.mean(np.array(most) < 0.75) > 0.95  # without the tries it is a third
    small, labels = segment.random_crop(image.resize((10, 12)), label.resize((10, 12), Image.NEAREST), 16, rng_of(0))
    labels = np.asarray(labels)
    assert small.size == (16, 16) and (labels[:12, :10] < 2).all() and (labels[12:] == 255).all()
    assert small.getpixel((15, 15)) == finetune.FILL["fillcolor"] and (labels[:, 10:] == 255).all()


def test_the_longer_side_is_bounded():
    for size, ratio, expected in (((200, 100), 1.0, (100, 50)), ((100, 100), 0.5, (25, 25)),
                                  ((1000, 100), 1.0, (200, 20))):
        image, label = segment.rescaled(Image.new("RGB", size), Image.new("L", size), 50, ratio)
        assert image.size == label.size == expected
    label = Image.fromarray(rng_of(0).choice(np.array([3, 40, 255], np.uint8), (30, 30)))
    assert set(np.unique(segment.rescaled(label.convert("RGB"), label, 50, 1.0)[1])) == {3, 40, 255}


def test_colours_change_half_of_the_time_and_labels_never(world):
    tests = data.segmentation_set(world / "pixels", split="train")
    assert len(tests.pictures) == 8 and len(data.segmentation_set(world / "pixels", split="test").pictures) == 2
    image, label = tests.load(0)
    assert set(np.unique(label)) <= {*range(42), 255}
    changed = [not np.array_equal(segment.recoloured(image, rng_of(i)), image) for i in range(40)]
    assert 0.7 < np.mean(changed) <= 1
    sample = segment.LabelledPixels(tests, segment.SegmentConfig(), 64)
    a, b = sample[0, 1], sample[0, 1]
    assert a["images"].equal(b["images"]) and a["labels"].equal(b["labels"])
    assert a["images"].shape == (64, 64, 3) and a["labels"].shape == (64, 64)


def test_mirror_and_crop_move_labels_with_their_pixels(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("dark\nlight\n")
    label = np.kron(rng_of(0).integers(1, 3, (8, 8)), np.ones((8, 8), int)).astype(np.uint8)
    Image.fromarray(label).save(tmp_path / "labels/a.png")
    Image.fromarray(np.stack([np.where(label == 2, 200, 20)] * 3, -1).astype(np.uint8)).save(tmp_path / "images/a.png")
    sample = segment.LabelledPixels(data.segmentation_set(tmp_path), segment.SegmentConfig(), 48)
    right = []
    for epoch in range(30):
        drawn = sample[epoch, 0]
        seen = drawn["labels"] < 2
        light = drawn["images"].float().mean(2) > 100  # colours move less than that nearly always
        right.append((light == drawn["labels"].bool())[seen].float().mean().item())
    assert np.median(right) > 0.9


def test_layouts_of_labelled_pictures(tmp_path):
    def add(folder, labels, count=2, value=1):
        for i in range(count):
            for part, mode in ((folder, "RGB"), (labels, "L")):
                (tmp_path / part).mkdir(parents=True, exist_ok=True)
                Image.new(mode, (8, 6), value if mode == "L" else "red").save(tmp_path / part / f"{i}.png")
    root = "root/ADEChallengeData2016"
    add(f"{root}/images/training", f"{root}/annotations/training", 3)
    add(f"{root}/images/validation", f"{root}/annotations/validation")
    (tmp_path / root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t.1\t1\t1\t1\twall, x\n")
    train_set, tests = (data.segmentation_set("ade20k", tmp_path / "root", split) for split in ("train", "test"))
    assert (len(train_set.pictures), len(tests.pictures), tests.names) == (3, 2, ["wall"])
    assert np.unique(tests.load(0)[1]).tolist() == [0] and not tests.remarks
    add(f"{root}/images/validation", f"{root}/annotations/validation", value=255)
    assert np.unique(tests.load(0)[1]).tolist() == [255]
    add("own/train/images", "own/train/labels", 4)
    add("own/val/images", "own/val/labels", 1, 2)
    (tmp_path / "own/classes.txt").write_text("a\n")
    assert len(data.segmentation_set(tmp_path / "own", split="train").pictures) == 4
    with pytest.raises(ValueError, match=r"0.png holds 2: there are 1 classes"):
        data.segmentation_set(tmp_path / "own", split="test").load(0)
    Image.new("RGB", (8, 6)).save(tmp_path / "own/val/labels/0.png")
    with pytest.raises(ValueError, match="mode RGB"):
        data.segmentation_set(tmp_path / "own", split="test").load(0)
    Image.new("L", (9, 6)).save(tmp_path / "own/val/labels/0.png")
    with pytest.raises(ValueError, match="9 x 6"):
        data.segmentation_set(tmp_path / "own", split="test").load(0)
    (tmp_path / "own/val/labels/0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot read the label picture"):
        data.segmentation_set(tmp_path / "own", split="test").load(0)
    (tmp_path / "own/val/labels/0.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 1 label pictures are missing"):
        data.segmentation_set(tmp_path / "own", split="test")
    (tmp_path / "own/classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no classes.txt"):
        data.segmentation_set(tmp_path / "own")


def test_upernet_has_the_sizes_that_mmsegmentation_gives_it():
    with torch.device("meta"):
        model = segment.UPerNet(replace(models.ModelConfig(), image_size=512), 150)
        out, auxiliary = model(torch.zeros(2, 3, 512, 512))
    count = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in
             ("decode_head", "auxiliary_head", "neck")}
    # mmsegmentation 1.2.2: UPerHead, FCNHead and Feature2Pyramid as its configs of ViT-B on ADE20K build them
    assert count == dict(decode_head=67_963_542, auxiliary_head=1_808_534, neck=7_081_728)
    assert out.shape == (2, 150, 512, 512) and auxiliary.shape == (2, 150, 32, 32) and model.layers == [4, 6, 8, 12]
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    for name, shape in {"decode_head.psp_modules.2.1.conv.weight": (768, 768, 1, 1),
                        "decode_head.bottleneck.conv.weight": (768, 3840, 3, 3),
                        "decode_head.lateral_convs.0.bn.running_mean": (768,),
                        "decode_head.fpn_convs.2.conv.weight": (768, 768, 3, 3),
                        "decode_head.fpn_bottleneck.conv.weight": (768, 3072, 3, 3),
                        "decode_head.conv_seg.weight": (150, 768, 1, 1),
                        "auxiliary_head.convs.0.conv.weight": (256, 768, 3, 3),
                        "neck.upsample_4x.3.weight": (768, 768, 2, 2), "neck.upsample_2x.0.bias": (768,)}.items():
        assert shapes[name] == shape, name


# ---------------------------------------------------------------- beside timm and transformers

class Drawn:
    """Python's `random` and NumPy's functions of that name, drawn from a Generator."""

    def __init__(self, rng):
        self.random, self.uniform, self.gauss, self.beta = rng.random, rng.uniform, rng.normal, rng.beta
        self.rand = lambda: 0.0 if not hasattr(self, "asked") and setattr(self, "asked", True) is None else rng.random()
        self.randint = lambda low, high=None, size=None: int(rng.integers(low, high if size is None else high))
        self.inclusive = lambda low, high: int(rng.integers(low, high + 1))


@pytest.mark.peers
def test_layer_rates_equal_timms():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay
    theirs = timm.create_model("vit_base_patch16_224", num_classes=10)
    ours = finetune.Classifier(models.ModelConfig(), 10)
    wanted = {}
    names = {id(p): name for name, p in theirs.named_parameters()}
    for group in param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.65):
        wanted |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    names = {id(p): name.removeprefix("visual.") for name, p in ours.named_parameters()}
    found = {}
    for group in finetune.parameter_groups(ours, finetune.TuneConfig()):
        found |= {names[id(p)]: (group["scale"], group["weight_decay"]) for p in group["params"]}
    assert found.keys() == wanted.keys() and len(found) == 152
    for name, pair in wanted.items():
        if name.startswith("norm."):  # timm has the last norm with the last block; BEiT's code, and ours, with the head
            assert pair == (0.65, 0) and found[name] == (1, 0)
        else:
            assert found[name] == pytest.approx(pair), name


@pytest.mark.peers
def test_stochastic_depth_equals_timms():
    from timm.layers import DropPath
    from timm.models.vision_transformer import VisionTransformer
    theirs = VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=5, num_heads=2, drop_path_rate=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    x = torch.randn(64, 3, 8)
    block = models.Block(8, 2)
    block.drop_path = 0.3
    torch.manual_seed(5)
    ours = block.dropped(x)
    torch.manual_seed(5)
    assert ours.equal(DropPath(0.3).train()(x))
    assert rates == pytest.approx(torch.linspace(0, 0.2, 5).tolist())


@pytest.mark.peers
def test_rand_augment_equals_timms(monkeypatch):
    from timm.data import auto_augment
    image = data.draw_scene(rng_of(1), 3, data.CLASSES)[0].resize((80, 64))
    theirs = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(
        translate_const=100, img_mean=finetune.FILL["fillcolor"], interpolation=Image.BICUBIC))
    refused = 0
    for seed in range(400):
        rng = rng_of(seed)
        numbers = rng.integers(15, size=2)
        monkeypatch.setattr(auto_augment, "random", Drawn(rng))
        monkeypatch.setattr(auto_augment.np.random, "choice", lambda ops, *_, numbers=numbers, **__: [ops[k] for k in
                                                                                                   numbers])
        try:
            wanted = theirs(image)
        except ValueError as error:  # posterize to 0 bits, which Pillow 12 refuses: timm then fails, we keep one bit
            assert "bits must be" in str(error)
            refused += 1
            continue
        assert np.array_equal(finetune.rand_augment(image, 9, rng_of(seed)), wanted), seed
    assert refused < 8


@pytest.mark.peers
def test_erased_boxes_equal_timms(monkeypatch):
    from timm.data import random_erasing
    eraser = random_erasing.RandomErasing(probability=1.0, mode="pixel", device="cpu")
    for seed in range(200):
        draws = Drawn(rng_of(seed))
        draws.random, draws.randint = (lambda: 0.0), draws.inclusive
        monkeypatch.setattr(random_erasing, "random", draws)
        erased = eraser(torch.zeros(3, 40, 56))
        rows, columns = (erased != 0).any(0).any(1).nonzero(), (erased != 0).any(0).any(0).nonzero()
        box = int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert finetune.erased_box(40, 56, rng_of(seed)) == box


@pytest.mark.peers
def test_mixtures_equal_timms(monkeypatch):
    from timm.data import mixup
    theirs = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=7)
    for seed in range(60):
        images, labels = torch.randn(6, 3, 24, 18), torch.randint(0, 7, (6,))
        ours, targets = finetune.mix(images.clone(), labels, 7, finetune.TuneConfig(), rng_of(seed))
        with monkeypatch.context() as patch:
            draws = Drawn(rng_of(seed))
            for name in ("rand", "beta", "randint"):
                patch.setattr(mixup.np.random, name, getattr(draws, name))
            wanted, wanted_targets = theirs(images.clone(), labels)
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(targets, wanted_targets)


@pytest.mark.peers
def test_upernet_equals_transformers():
    from transformers import BeitConfig
    from transformers.models.beit import modeling_beit as beit
    config = BeitConfig(hidden_size=48, num_labels=9, num_hidden_layers=4, num_attention_heads=4, image_size=64,
                        pool_scales=[1, 2, 3, 6], auxiliary_channels=16, auxiliary_num_convs=1,
                        auxiliary_concat_input=False, out_indices=[1, 2, 3, 4], out_features=None)
    torch.manual_seed(0)
    ours = segment.UPerNet(replace(TINY, width=48, depth=4, heads=4), 9).eval()
    for name, x in ours.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.rand_like(x) + 0.5 if "running_var" in name else torch.randn_like(x) * 0.2)
    maps = [torch.randn(2, 48, 8, 8) for _ in range(4)]
    theirs, auxiliary = beit.BeitUperHead(config).eval(), beit.BeitFCNHead(config).eval()

    def renamed(head):
        state = {}
        for name, x in head.state_dict().items():
            for own, other in ((r"psp_modules\.(\d)\.1", r"psp_modules.blocks.\1.conv"), (r"bn\.", "normalization."),
                               ("^bottleneck", "psp_bottleneck"), ("conv_seg", "classifier"),
                               (r"conv\.weight", "convolution.weight")):
                name = re.sub(own, other, name)
            state[name] = x
        return state
    theirs.load_state_dict(renamed(ours.decode_head))
    auxiliary.load_state_dict(renamed(ours.auxiliary_head))
    scaled = ours.neck(maps)
    torch.testing.assert_close(ours.decode_head(scaled), theirs(scaled))
    torch.testing.assert_close(ours.auxiliary_head(scaled[2]), auxiliary(scaled))


@pytest.mark.gpu
def test_fine_tuning_and_segmentation_on_cuda(world, tmp_path):
    tune(world, tmp_path / "tune", drop_path=0.1, ema=0.9)
    tune(world, tmp_path / "segment", kind=segment, batch_size=2)
    for name in ("tune", "segment"):
        assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / name))


def test_linear_schedule_of_segmentation():
    run = segment.Segmentation.__new__(segment.Segmentation)
    run.config, run.per_epoch, run.total = segment.SegmentConfig(lr=1.0, warmup_epochs=1.0), 10, 100
    rates = []
    for run.step in range(100):
        rates.append(run.schedule())
    assert rates[0] == pytest.approx(1 / 11) and rates.index(max(rates)) == 9 and max(rates) > 0.9
    assert rates[50] == 0.5 and 0 < rates[99] < 0.011
