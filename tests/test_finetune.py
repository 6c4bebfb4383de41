"""Fine-tuning and the linear probe: each piece against a naive one or timm's; runs; faults."""
import dataclasses
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model as models
from downstream import finetune
from helpers import SMALL, answer, finish, log_lines, same_weights, saved, start
from support import demo, testsets


def rng_of(*seed):
    return np.random.default_rng(seed)


def save_tower(path):
    """A checkpoint of a small tower."""
    torch.manual_seed(3)
    config = dataclasses.replace(SMALL, method="vit")
    model = models.VisionModel(config)
    models.init_weights(model)
    torch.save(dict(model=model.state_dict(), model_config=dataclasses.asdict(config)), path)


def words(**given):
    """Settings as a command line; None: not given."""
    line = []
    for name, value in given.items():
        if value is not None:
            line += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two class folders with 8 pictures each to train and 4 to test; a small tower's checkpoint."""
    folder = tmp_path_factory.mktemp("world")
    for split, count in (("train", 8), ("test", 4)):
        for c, name in enumerate(("red star", "blue circle")):
            (folder / "classes" / split / name).mkdir(parents=True)
            for i in range(count):
                picture = demo.draw_scene(rng_of(count, c, i), 1, [name])[0]
                picture.save(folder / "classes" / split / name / f"{i}.png")
    save_tower(folder / "tower.pt")
    return folder


def line_of(world, out, **changes):
    """The command line of four epochs of four steps of four pictures."""
    given = dict(data=world / "classes", checkpoint=world / "tower.pt", out=out, epochs=4,
                 batch_size=4, workers=0, log_every=1, warmup_epochs=1)
    return words(**given | changes)


def tune(world, out, constants=(), **changes):
    """A run in this process.  constants: fields that are no flags.  -> the lines of its log"""
    config = finetune.command_line(line_of(world, out, **changes))
    finetune.train(dataclasses.replace(config, **dict(constants)))
    return log_lines(out)


def classifier(**given):
    """A model as a run makes it, of ten classes, and its settings."""
    config = finetune.TuneConfig(**given)
    return finetune.make_model(
        config, None, lambda shape: finetune.Classifier(shape, 10, config)), config


# ---------------------------------------------------------------- pieces

def test_positions_are_resized_as_a_grid_and_the_tower_is_the_checkpoints(world):
    plane = torch.arange(4.0)[:, None] * 10 + torch.arange(4.0)  # rows and columns told apart
    positions = torch.cat([torch.full((1,), 7.0), plane.flatten()]).view(1, 17, 1)
    larger = finetune.resized_positions(positions, 8)
    assert larger.shape == (1, 65, 1) and larger[0, 0] == 7
    inner = larger[0, 1:, 0].view(8, 8)[3:5, 3:5]
    assert inner.flatten().tolist() == pytest.approx([13.75, 14.25, 18.75, 19.25], abs=0.6)
    assert finetune.resized_positions(positions, 4).equal(positions)
    model, _ = classifier(checkpoint=str(world / "tower.pt"), image_size=64)
    trained = evaluate.load_model(world / "tower.pt")[0].visual.state_dict()
    for name, x in model.visual.state_dict().items():
        assert name == "pos_embed" or x.equal(trained[name]), name
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("more, numbers", [
    ([], (4e-3, 100, 0.65, 1024)), (["--linear"], (0, 90, 1, 1024)),            # SLIP, MoCo v3
    (["--scratch", "--model", "vit_b16"], (1e-3, 300, 1, 1024)),                # DeiT
    (["--scratch", "--model", "tiny", "--epochs", "7"], (1e-3, 7, 1, 64))])
def test_recipes(world, more, numbers):
    start_from = [] if "--scratch" in more else ["--checkpoint", str(world / "tower.pt")]
    config = finetune.command_line(["--data", "x/classes", *start_from, *more])
    assert (config.lr, config.epochs, config.layer_decay, config.batch_size) == numbers
    assert config.out.startswith("runs/") and "-classes" in config.out


def test_a_picture_is_drawn_from_seed_epoch_and_number(world):
    tests = testsets.test_set(str(world / "classes"), split="train")
    samples = finetune.LabelledPictures(tests, finetune.TuneConfig(erase=1.0), 64)
    first = samples[0, 3]
    assert first["images"].equal(samples[0, 3]["images"])
    assert not first["images"].equal(samples[1, 3]["images"])
    assert first["images"].shape == (64, 64, 3) and first["labels"] == tests.targets[3]
    whole = finetune.LabelledPictures(tests, finetune.TuneConfig(erase=0.0), 64)[0, 3]
    changed = (whole["images"] != first["images"]).any(2)
    box = changed[changed.any(1)][:, changed.any(0)]
    assert box.float().mean() > 0.9 and 0.01 < changed.float().mean() < 0.36  # noise in one box


@pytest.mark.parametrize("linear, resample", [(False, Image.BICUBIC), (True, Image.BILINEAR)])
def test_pictures_are_tested_in_the_middle_at_256_224ths(world, linear, resample):
    tests = testsets.probe_sets(str(world / "classes"))[1]
    model, config = classifier(checkpoint=str(world / "tower.pt"), linear=linear)
    seen, forward = [], model.forward
    model.forward = lambda images: seen.append(images) or forward(images)
    result = finetune.measure(model, tests, config, torch.autocast("cpu", enabled=False))
    views = []
    for path in tests.pictures:
        image = Image.open(path).convert("RGB").resize((36, 36), resample)  # 36 = 32 * 256 // 224
        views.append(np.asarray(image.crop((2, 2, 34, 34))))
    pixels = data.normalize(torch.from_numpy(np.stack(views)))
    torch.testing.assert_close(torch.cat(seen), pixels)
    right = forward(pixels).argmax(1) == tests.targets
    assert result["scores"] == {"accuracy": right.float().mean().item()}


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("changes", [dict(drop_path=0.3), dict(linear=True, warmup_epochs=0)])
def test_two_steps_and_two_more_are_four_bit_for_bit(world, tmp_path, changes):
    constants = dict(magnitude=9.0, erase=0.5, mixup=0.8)
    one = tune(world, tmp_path / "one", constants, steps=4, **changes)
    tune(world, tmp_path / "two", constants, steps=2, **changes)
    two = tune(world, tmp_path / "two", constants, steps=4, **changes)
    assert len(one) == 4 and one == two
    states = [saved(tmp_path / name) for name in ("one", "two")]
    assert same_weights(*states, parts=["model"]) and len(states[1]["made_by"]) == 2


def test_fine_tuning_learns_and_appends_its_scores(world, tmp_path, capsys, monkeypatch):
    constants = dict(mixup=0.0, magnitude=0.0, erase=0.0)
    changes = dict(epochs=8, eval_every=4, lr=5e-3, layer_decay=0.9, drop_path=0)
    measured, measure = [], finetune.measure
    monkeypatch.setattr(finetune, "measure",
                        lambda *given: measured.append(given) or measure(*given))
    lines = tune(world, tmp_path, constants, **changes)
    assert len(measured) == 2  # not once more at the end
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    cosine = [1e-6 + (5e-3 - 1e-6) * (1 + math.cos(math.pi * i / 28)) / 2 for i in range(28)]
    rates = [1e-6 + (5e-3 - 1e-6) * i / 4 for i in range(4)] + cosine
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    (record,) = evaluate.read_results(tmp_path)
    assert record["task"] == f"finetune {world / 'classes'}"
    assert record["scores"]["accuracy"] == lines[-1]["finetune"] >= 0.75
    assert (tmp_path / "best.pt").is_file() and (tmp_path / "epoch-8.pt").is_file()
    before = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    tune(world, tmp_path, constants, **changes)  # a complete run is only evaluated again
    assert (tmp_path / "last.pt").read_bytes() == before
    assert f"{100 * record['scores']['accuracy']:.1f}" in capsys.readouterr().out
    tower = evaluate.load_model(tmp_path / "last.pt")[0].visual.state_dict()
    tuned = saved(tmp_path)["model"]
    assert all(x.equal(tuned[f"visual.{name}"]) for name, x in tower.items())


def test_the_probe_is_moco_v3s(world, tmp_path):
    lines = tune(world, tmp_path, linear=True, epochs=3, batch_size=8, warmup_epochs=None)
    rates = [3 * 8 / 256 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (0, 0, 1, 1, 2, 2)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    state = saved(tmp_path)
    for group in state["optimizer"]["param_groups"]:
        assert group["momentum"] == 0.9 and group["weight_decay"] == 0 and len(group["params"]) == 1
    trained = evaluate.load_model(world / "tower.pt")[0].visual.state_dict()
    assert all(x.equal(state["model"][f"visual.{name}"]) for name, x in trained.items())  # frozen
    assert evaluate.read_results(tmp_path)[0]["task"] == f"linear {world / 'classes'}"


@pytest.mark.slow
def test_two_ranks_learn_what_one_does_and_resume(world, tmp_path):
    changes = dict(scratch=True, model="tiny", checkpoint=None, eval_every=4)
    one = tune(world, tmp_path / "one", **changes)
    for steps in (6, 0):
        line = line_of(world, tmp_path / "two", steps=steps, **changes)
        code, _, err = finish(start("downstream/finetune.py", *line, ranks=2))
        assert code == 0, err
    two = log_lines(tmp_path / "two")
    losses = [[line["loss"] for line in lines] for lines in (one, two)]
    assert len(one) == len(two) == 16 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    scores = evaluate.read_results(tmp_path / "two")[0]["scores"]
    assert one[-1]["finetune"] == two[-1]["finetune"] == scores["accuracy"]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(precision="fp16"),
                                     dict(linear=True, warmup_epochs=0)])
def test_fine_tuning_on_cuda(world, tmp_path, changes):
    assert all(math.isfinite(line["loss"]) for line in tune(world, tmp_path, **changes))


# ---------------------------------------------------------------- faults

def test_a_run_does_not_resume_on_other_classes(world, tmp_path):
    shutil.copytree(world / "classes", tmp_path / "classes")
    tune(world, tmp_path / "run", data=str(tmp_path / "classes"), steps=1)
    for split in ("train", "test"):
        name = min(path.name for path in (tmp_path / "classes" / split).iterdir())
        (tmp_path / "classes" / split / name).rename(tmp_path / "classes" / split / "zzz")
    with pytest.raises(ValueError, match="data was different"):
        tune(world, tmp_path / "run", data=str(tmp_path / "classes"), steps=2)


@pytest.mark.parametrize("linear", [None, True])
def test_a_nan_changes_nothing_and_a_signal_saves(world, tmp_path, monkeypatch, linear):
    mix = finetune.mix

    def run(out, nan=0, term=0, **changes):
        """A run whose batch number `nan` is spoiled, and which has a signal in step `term`."""
        steps = iter(range(1, 99))

        def disturbed(images, *others):
            step = next(steps)
            if step == term:
                os.kill(os.getpid(), signal.SIGTERM)
            images, targets = mix(images, *others)
            return images * (math.nan if step == nan else 1), targets
        monkeypatch.setattr(finetune, "mix", disturbed)
        return tune(world, tmp_path / out, linear=linear, warmup_epochs=0, epochs=1, **changes)
    with monkeypatch.context() as patch:  # new memory is garbage, and a first step may be skipped
        patch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, math.nan))
        lines = run("a", nan=1, steps=2)
    assert [line["skipped"] for line in lines] == [1, 1] and lines[0]["loss"] is None
    assert all(x.isfinite().all() for x in saved(tmp_path / "a")["model"].values())
    run("b", nan=2, steps=2)
    run("c", steps=1)
    assert same_weights(*(saved(tmp_path / name) for name in "bc"), parts=["model"])
    complete = run("d")
    for step in (3, 4):  # of 4
        assert len(run(f"e{step}", term=step)) == step == saved(tmp_path / f"e{step}")["step"]
        assert (tmp_path / f"e{step}/results.jsonl").is_file() == (step == 4)
        assert run(f"e{step}") == complete


def test_a_folder_keeps_its_run_and_says_what_it_started_from(world, tmp_path):
    tune(world, tmp_path / "a", epochs=3)
    shutil.copy(world / "tower.pt", tmp_path / "other.pt")
    with pytest.raises(ValueError, match="--checkpoint"):
        tune(world, tmp_path / "a", epochs=3, checkpoint=tmp_path / "other.pt", force=True)
    shutil.copytree(world / "classes", tmp_path / "three")
    for split in ("train", "test"):
        shutil.copytree(world / "classes" / split / "red star", tmp_path / "three" / split / "new")
    with pytest.raises(ValueError, match="3: give another --out"):
        tune(world, tmp_path / "a", epochs=3, data=tmp_path / "three", force=True)
    (tmp_path / "moved").symlink_to(world / "classes")
    tune(world, tmp_path / "b", epochs=3, checkpoint=None, resume=tmp_path / "a/epoch-2.pt",
         data=tmp_path / "moved")
    assert same_weights(saved(tmp_path / "a"), saved(tmp_path / "b"), parts=["model"])


def test_what_is_impossible_is_said_in_a_sentence(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "classes", tmp_path / "classes")
    damaged = tmp_path / "classes/train/red star/3.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    for changes, word in ((dict(data="nowhere"), "nowhere"), (dict(scratch=True), "--checkpoint"),
                          (dict(image_size=60), "multiple"), (dict(batch_size=17), "--batch-size"),
                          (dict(warmup_epochs=5), "--warmup-epochs"),
                          (dict(data=tmp_path / "classes"), "red star/3.png")):
        line = line_of(world, tmp_path / "out", **changes)
        sentence = answer(finetune.main, line, monkeypatch, capsys)
        assert sentence.strip().startswith("finetune.py: error: ") and word in sentence


@pytest.mark.slow
def test_a_damaged_picture_in_a_loader_process_is_a_sentence(world, tmp_path):
    shutil.copytree(world / "classes", tmp_path / "classes")
    damaged = tmp_path / "classes/train/red star/3.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    line = line_of(world, tmp_path / "out", data=tmp_path / "classes", workers=1)
    code, _, err = finish(start("downstream/finetune.py", *line))
    assert code == 1 and "red star/3.png" in err and "Traceback" not in err


# ---------------------------------------------------------------- next to timm

class Drawn:
    """Python's `random` and NumPy's functions of that name, drawn from a Generator."""

    def __init__(self, rng):
        self.random, self.uniform, self.gauss, self.beta = (
            rng.random, rng.uniform, rng.normal, rng.beta)
        first = [0.0]  # timm first draws whether to mix at all, which it always does
        self.rand = lambda: first.pop() if first else rng.random()
        self.randint = lambda low, high=None, size=None: int(
            rng.integers(low, high if size is None else high))
        self.inclusive = lambda low, high: int(rng.integers(low, high + 1))


@pytest.mark.peers
def test_layer_rates_and_stochastic_depth_equal_timms():
    timm = pytest.importorskip("timm")
    optim = pytest.importorskip("timm.optim")
    theirs = timm.create_model("vit_base_patch16_224", num_classes=10, drop_path_rate=0.2)
    groups = optim.param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(),
                                            layer_decay=0.65)

    def by_name(model, groups, scale, prefix=""):
        names = {id(p): name.removeprefix(prefix) for name, p in model.named_parameters()}
        return {names[id(p)]: (group[scale], group["weight_decay"])
                for group in groups for p in group["params"]}
    wanted = by_name(theirs, groups, "lr_scale")
    ours, config = classifier(scratch=True, drop_path=0.2)
    rates = by_name(ours, finetune.parameter_groups(ours, config), "scale", "visual.")
    assert rates.keys() == wanted.keys() and len(rates) == 152
    for name, pair in wanted.items():
        if name.startswith("norm."):  # with the last block in timm, with the head in BEiT's code
            assert pair == (0.65, 0) and rates[name] == (1, 0)
        else:
            assert rates[name] == pytest.approx(pair), name
    depths = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    assert [block.drop_path for block in ours.visual.blocks] == pytest.approx(depths)


@pytest.mark.peers
def test_rand_augment_equals_timms(monkeypatch):
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    image = demo.draw_scene(rng_of(1), 3, demo.CLASSES)[0].resize((80, 64))
    theirs = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(
        translate_const=100, img_mean=finetune.MEAN_COLOUR, interpolation=Image.BICUBIC))
    refused = 0
    for seed in range(400):
        rng = rng_of(seed)
        numbers = rng.integers(15, size=2)
        monkeypatch.setattr(auto_augment, "random", Drawn(rng))
        monkeypatch.setattr(auto_augment.np.random, "choice", lambda choices, *_, numbers=numbers,
                            **__: [choices[number] for number in numbers])
        try:
            wanted = theirs(image)
        except ValueError as error:  # Pillow 12 refuses to posterize to 0 bits; we keep one bit
            assert "bits must be" in str(error)
            refused += 1
            continue
        assert np.array_equal(finetune.rand_augment(image, 9, rng_of(seed)), wanted), seed
    assert refused < 8


@pytest.mark.peers
def test_erased_boxes_and_mixtures_equal_timms(monkeypatch):
    random_erasing = pytest.importorskip("timm.data.random_erasing")
    mixup = pytest.importorskip("timm.data.mixup")
    eraser = random_erasing.RandomErasing(probability=1.0, mode="pixel", device="cpu")
    for seed in range(200):
        draws = Drawn(rng_of(seed))
        draws.random, draws.randint = (lambda: 0.0), draws.inclusive
        monkeypatch.setattr(random_erasing, "random", draws)
        erased = eraser(torch.zeros(3, 40, 56)).ne(0).any(0)
        pixels = np.full((40, 56, 3), 77, np.uint8)
        finetune.erase(pixels, rng_of(seed))
        ours = (pixels != 77).any(2)    # of few pixels the noise is 77 too
        assert not (ours & ~erased.numpy()).any() and ours.sum() > 0.98 * erased.sum()
    theirs = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=7)
    for seed in range(60):
        images, labels = torch.randn(6, 3, 24, 18), torch.randint(0, 7, (6,))
        ours = finetune.mix(images.clone(), labels, 7, finetune.TuneConfig(), rng_of(seed))
        with monkeypatch.context() as patch:
            draws = Drawn(rng_of(seed))
            for name in ("rand", "beta", "randint"):
                patch.setattr(mixup.np.random, name, getattr(draws, name))
            wanted = theirs(images.clone(), labels)
        torch.testing.assert_close(ours, wanted)
