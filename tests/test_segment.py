"""Segmentation: networks next to mmsegmentation's sizes and transformers' heads, crops, runs."""
import dataclasses
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import model as models
from downstream import finetune, segment
from helpers import SMALL, answer, finish, log_lines, same_weights, saved, start
from support import demo
from test_finetune import rng_of, save_tower, words


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten labelled scenes, of which two are for testing, and a checkpoint of a small tower."""
    folder = tmp_path_factory.mktemp("world")
    for part in ("images", "labels"):
        (folder / "pixels" / part).mkdir(parents=True)
    (folder / "pixels/classes.txt").write_text("\n".join(demo.CLASSES) + "\n")
    for i in range(10):
        picture, label, _, _ = demo.draw_scene(rng_of(7, i), 2, demo.CLASSES)
        picture.save(folder / f"pixels/images/{i}.png")
        label.save(folder / f"pixels/labels/{i}.png")
    save_tower(folder / "tower.pt")
    return folder


def line_of(world, out, **changes):
    """The command line of a run."""
    given = dict(data=world / "pixels", checkpoint=world / "tower.pt", out=out, epochs=4,
                 batch_size=2, workers=0, log_every=1, image_size=32)
    return words(**given | changes)


def train(world, out, **changes):
    """A run in this process.  -> the lines of its log"""
    segment.train(segment.command_line(line_of(world, out, **changes)))
    return log_lines(out)


# ---------------------------------------------------------------- networks

def test_upernet_has_the_sizes_that_mmsegmentation_gives_it():
    with torch.device("meta"):
        model = segment.UPerNet(dataclasses.replace(models.ModelConfig(), image_size=512), 150)
    count = {name: sum(p.numel() for p in getattr(model, name).parameters())
             for name in ("decode_head", "auxiliary_head", "neck")}
    # mmsegmentation 1.2.2: UPerHead, FCNHead, Feature2Pyramid of its configs of ViT-B on ADE20K
    assert count == dict(decode_head=67_963_542, auxiliary_head=1_808_534, neck=7_081_728)
    assert model.layers == [4, 6, 8, 12]
    out, auxiliary = segment.UPerNet(SMALL, 5)(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 5, 32, 32) and auxiliary.shape == (2, 5, 4, 4)


@pytest.mark.peers
def test_upernet_equals_transformers():
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    config = beit.BeitConfig(
        hidden_size=48, num_labels=9, num_hidden_layers=4, num_attention_heads=4, image_size=64,
        pool_scales=[1, 2, 3, 6], auxiliary_channels=16, auxiliary_num_convs=1,
        auxiliary_concat_input=False, out_indices=[1, 2, 3, 4], out_features=None)
    torch.manual_seed(0)
    shape = dataclasses.replace(models.PRESETS["tiny"], width=48, depth=4, heads=4)
    ours = segment.UPerNet(shape, 9).eval()
    for name, x in ours.state_dict().items():
        if x.is_floating_point():
            is_variance = "running_var" in name
            x.copy_(torch.rand_like(x) + 0.5 if is_variance else torch.randn_like(x) * 0.2)
    maps = [torch.randn(2, 48, side, side) for side in (32, 16, 8, 4)]
    theirs, auxiliary = beit.BeitUperHead(config).eval(), beit.BeitFCNHead(config).eval()

    def renamed(head):
        state = {}
        for name, x in head.state_dict().items():
            for old, new in ((r"psp_modules\.(\d)\.1", r"psp_modules.blocks.\1.conv"),
                             (r"bn\.", "normalization."), ("^bottleneck", "psp_bottleneck"),
                             ("conv_seg", "classifier"), (r"conv\.weight", "convolution.weight")):
                name = re.sub(old, new, name)
            state[name] = x
        return state
    theirs.load_state_dict(renamed(ours.decode_head))
    auxiliary.load_state_dict(renamed(ours.auxiliary_head))
    torch.testing.assert_close(ours.decode_head(maps), theirs(maps))
    torch.testing.assert_close(ours.auxiliary_head(maps[2]), auxiliary(maps))


def test_the_loss_is_the_mean_over_all_pixels_with_unlabelled_ones_at_zero():
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 8, 8))
    labels[:, 5:] = 255
    large = torch.nn.functional.interpolate(logits.double(), (8, 8), mode="bilinear")
    log, total = large.log_softmax(1), 0.0
    for b, y, x in (labels != 255).nonzero().tolist():
        total -= log[b, labels[b, y, x], y, x].item()
    assert segment.pixel_loss(logits, labels).item() == pytest.approx(total / 128, rel=1e-5)


# ---------------------------------------------------------------- pictures with labels

def test_crops_avoid_a_single_class_and_mark_what_is_missing():
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 1
    image, label = Image.new("RGB", (40, 40), "white"), Image.fromarray(label)
    crops = [np.asarray(segment.random_crop(image, label, 16, rng_of(i))[1]) for i in range(200)]
    largest = np.array([np.bincount(crop.ravel()).max() / 256 for crop in crops])
    assert np.mean(largest < 0.75) > 0.95  # a third without the tries
    small = [part.resize((10, 12), Image.NEAREST) for part in (image, label)]
    square, labels = segment.random_crop(*small, 16, rng_of(0))
    inside = np.asarray(labels) < 2
    assert inside[:12, :10].all() and inside.sum() == 120 and labels.getextrema()[1] == 255
    assert square.size == (16, 16) and square.getpixel((15, 15)) == finetune.MEAN_COLOUR


@pytest.mark.parametrize("draw", [0.0, 0.9])
def test_colours_are_changed_as_by_hand(draw):
    drawn = {(-32, 32): 20.0, (0.5, 1.5): 1.3, (-26, 27): 11}
    rng = SimpleNamespace(random=lambda: draw, uniform=lambda *ends: drawn[ends],
                          integers=lambda *ends: drawn[ends])
    image = demo.draw_scene(rng_of(11), 3, demo.CLASSES)[0]
    changed = np.asarray(image, float)
    if draw == 0:  # brightness and contrast come first, then saturation and hue
        changed = np.floor(np.minimum(255, 1.3 * np.trunc((changed + 20).clip(0, 255))))
    hsv = np.array(Image.fromarray(changed.astype(np.uint8)).convert("HSV"), int)
    if draw == 0:
        hsv[..., 1] = np.floor(np.minimum(255, hsv[..., 1] * 1.3))
        hsv[..., 0] = (hsv[..., 0] + 11) % 256
    wanted = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
    assert np.array_equal(segment.recoloured(image, rng), wanted)


def test_labels_move_with_their_pixels():
    label = np.kron(rng_of(0).integers(0, 2, (8, 8)), np.ones((8, 8)))
    label = Image.fromarray(label.astype(np.uint8))
    image = label.point(lambda x: 20 + 180 * x).convert("RGB")
    tests = SimpleNamespace(load=lambda _: (image, label))
    samples = segment.LabelledPixels(tests, segment.SegmentConfig(), 48)
    right = []
    for epoch in range(30):
        sample = samples[epoch, 0]
        light = sample["images"].float().mean(2) > 100  # colours nearly always move by less
        agrees = light == sample["labels"].bool()
        right.append(agrees[sample["labels"] < 2].float().mean().item())
    assert np.median(right) > 0.9
    assert samples[3, 0]["images"].equal(samples[3, 0]["images"])


# ---------------------------------------------------------------- windows

@pytest.mark.parametrize("height, width", [(8, 8), (5, 8), (8, 21), (13, 9), (30, 17)])
def test_windows_cover_a_picture_and_are_averaged(height, width):
    seen = []

    def model(window):  # each window has an answer of its own
        assert window.shape[2:] == (8, 8)
        seen.append(window)
        return torch.full((1, 2, 8, 8), float(len(seen))), None
    out = segment.slide(model, torch.randn(1, 3, height, width), 8, 5)
    total, count, number = torch.zeros(height, width), torch.zeros(height, width), 0
    for i in range(max(height - 8 + 4, 0) // 5 + 1):  # mmsegmentation's grid
        for j in range(max(width - 8 + 4, 0) // 5 + 1):
            bottom, right = min(5 * i + 8, max(height, 8)), min(5 * j + 8, max(width, 8))
            number += 1
            total[bottom - 8:bottom, right - 8:right] += number
            count[bottom - 8:bottom, right - 8:right] += 1
    assert number == len(seen) and out.shape == (1, 2, height, width)
    torch.testing.assert_close(out[0, 0], total / count)


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("head, drop_path", [("linear", 0), ("upernet", 0.3)])
def test_two_steps_and_two_more_are_four_bit_for_bit(world, tmp_path, head, drop_path):
    changes = dict(head=head, drop_path=drop_path)
    one = train(world, tmp_path / "one", steps=4, **changes)
    train(world, tmp_path / "two", steps=2, **changes)
    assert train(world, tmp_path / "two", steps=4, **changes) == one and len(one) == 4
    states = [saved(tmp_path / name) for name in ("one", "two")]
    assert same_weights(*states, parts=["model"])
    if head == "linear":
        trained = evaluate.load_model(world / "tower.pt")[0].visual.state_dict()
        assert all(x.equal(states[0]["model"][f"visual.{name}"]) for name, x in trained.items())
        assert len(states[0]["optimizer"]["state"]) == 2  # weight and bias alone


def test_a_run_learns_and_appends_its_scores(world, tmp_path, monkeypatch, capsys):
    lines = train(world, tmp_path / "a", head="linear", epochs=8, eval_every=4, lr=0.01)
    assert np.mean([line["loss"] for line in lines[-8:]]) < 0.95 * lines[0]["loss"]
    top, steps = 0.01, len(lines)
    wanted = [top * min((i + 1) / (1.2 * 4 + 1), 1 - i / steps) for i in range(steps)]
    assert [line["lr"] for line in lines] == pytest.approx(wanted)  # mmsegmentation's poly
    (record,) = evaluate.read_results(tmp_path / "a")
    assert record["task"].startswith("segment ")
    assert record["scores"]["mIoU"] == lines[-1]["segment"]
    for head, message in (("upernet", "--head"), ("fpn", "upernet")):
        line = line_of(world, tmp_path / "a", head=head, epochs=8, lr=0.01)
        assert message in answer(segment.main, line, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_two_ranks_learn_what_one_does_and_score_what_is_saved(world, tmp_path, head):
    changes = dict(head=head, batch_size=4, drop_path=0, eval_every=4)
    for steps in (3, 0):
        line = line_of(world, tmp_path / "two", steps=steps, **changes)
        code, _, err = finish(start("downstream/segment.py", *line, ranks=2))
        assert code == 0, err
    two = log_lines(tmp_path / "two")
    scores = evaluate.read_results(tmp_path / "two")[0]["scores"]
    train(world, tmp_path / "two", **changes)  # one rank evaluates what two have saved
    assert evaluate.read_results(tmp_path / "two")[0]["scores"] == scores
    assert scores["mIoU"] == two[-1]["segment"]
    if head == "linear":  # UPerNet's batch norm sees a rank's share
        one = train(world, tmp_path / "one", **changes)
        losses = [[line["loss"] for line in lines] for lines in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("head", segment.HEADS)
def test_segmentation_on_cuda(world, tmp_path, head):
    assert all(math.isfinite(line["loss"]) for line in train(world, tmp_path, head=head))
