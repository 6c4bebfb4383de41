"""The loop: recipes, schedules, resume, two ranks, signals, and what a user may give it that is wrong."""
import ctypes
import gc
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bench import Live
from test_model import SMALL, batch_of

import data
import evaluate
import losses
import model as models
import train
from downstream import pictures

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
    """The log without what the clock says."""
    measured = ("pictures_per_s", "data_wait", "memory_gib")
    return [{name: x for name, x in line.items() if name not in measured} for line in lines(out)]


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


# ---------------------------------------------------------------- one step's gradients

def gradients(method, count, rank=0, world=1, **changes):
    """A step on 8 pairs, a rank's share in `count` parts -> gradients, terms, features, what the teacher gave."""
    config = replace(SMALL, method=method, **changes)
    torch.manual_seed(0)
    model = models.build(config)
    weights = dict.fromkeys(("distill_weight", "mlm_weight", "pixel_weight", "simclr_weight"), 0.5)
    step, parts, _ = train.make_step(SimpleNamespace(
        model=model, teacher=models.Teacher(model) if method == "maskclip" else None,
        amp=torch.autocast("cpu", enabled=False), scaler=torch.amp.GradScaler("cpu", enabled=False),
        config=SimpleNamespace(batch_size=8, micro_batch=8 // world // count, **weights),
        place=train.Place(rank, world, torch.device("cpu"))), iter(()))
    batch = {name: x for name, x in batch_of(config, n=8).items() if name not in ("images", "views")}
    g = torch.Generator().manual_seed(1)
    batch |= dict(images=torch.randint(256, (8, 32, 32, 3), generator=g, dtype=torch.uint8),
                  views=torch.randint(256, (8, 2, 32, 32, 3), generator=g, dtype=torch.uint8))
    batch["mlm_ids"] = torch.tensor([1, 3, 9, 16, 23, 24, 37])  # two words, one, one, two, none, one, none, none
    batch["mlm_targets"] = batch["tokens"].flatten()[batch["mlm_ids"]]
    share = train.split(batch, world)[rank]
    for _ in range(2):  # DDP's second step is another than its first
        model.zero_grad(set_to_none=True)
        terms, features, means = step.gradients(step.sent(train.split(share, parts)))
    return {name: p.grad for name, p in model.named_parameters()}, terms, features, means


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({(method, count): gradients(method, count, rank, 2)[0] for method in models.METHODS for count in (1, 2)},
               f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """Under DDP, and in parts; each pass goes back by itself, and DDP sees the last one alone."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for method in models.METHODS:
        for name, expected in gradients(method, 1)[0].items():
            for of_rank, count in itertools.product(ranks, (1, 2)):
                got, scale = of_rank[method, count][name], max(expected.abs().max().item(), 0.05)
                assert torch.allclose(got, expected, atol=1e-5 * scale), (method, count, name)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("method,distill", [*((method, "hidden") for method in models.METHODS), ("maskclip", "all")])
def test_a_step_in_parts_equals_the_whole(method, distill, count):
    """All gradients, SimCLR's with its batch normalisation too; uneven numbers of masked words; the teacher's means."""
    whole, parts = (gradients(method, n, distill=distill) for n in (1, count))
    for name, gradient in whole[0].items():
        scale = max(gradient.abs().max().item(), 0.05)  # some are 0 but for rounding, as those before a normalisation
        assert torch.allclose(gradient, parts[0][name], atol=1e-5 * scale), name
    assert list(whole[1]) == list(parts[1])
    assert {name: x.item() for name, x in whole[1].items()} == pytest.approx(
        {name: x.item() for name, x in parts[1].items()}, rel=1e-5)
    assert set(whole[2]) == ({"image", "text"} if "text" in models.METHODS[method].needs else set())
    assert all(torch.allclose(x, parts[2][name], atol=1e-5) for name, x in whole[2].items())
    if method == "maskclip":
        assert parts[3].shape == (count, SMALL.codewords)
        assert torch.allclose(whole[3][0], parts[3].mean(0), atol=1e-5)


def test_the_bytes_that_live_are_counted():
    with Live() as live:
        x = torch.ones(1000) + 1        # 8,000 bytes while it is made
        y = x.view(10, 100)
        del x
        assert (live.now, live.peak) == (4000, 8000)
        del y
        assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("method,other", [("clip_mae", "masked"), ("maskclip", "masked"), ("slip", "views")])
def test_no_pass_holds_its_activations_while_another_one_goes(method, other):
    """A step's peak, against that of one graph of all passes."""
    config = replace(models.PRESETS["tiny"], method=method, depth=6, vocab_size=600)
    model, batch = models.build(config), batch_of(config, n=16, hidden=48)
    teacher = models.Teacher(model) if method == "maskclip" else None
    step = train.Step(model, model, teacher, torch.autocast("cpu", enabled=False), lambda terms: sum(terms.values()))
    batch |= {name: torch.zeros(*batch[name].movedim(-3, -1).shape, dtype=torch.uint8) for name in ("images", "views")}
    assert model.passes == (other, "pairs")

    def peak(compute):
        with Live() as live:
            compute()
        model.zero_grad()
        return live.peak

    def at_once():
        inputs = batch | {name: data.normalize(batch[name]) for name in ("images", "views")}
        out, logits = model(inputs), step.targets(inputs)
        terms = train.joint_terms(out) | train.masked_terms(out, inputs, logits, step.center, 8, {})
        sum(terms.values()).backward()
    at_once()
    assert peak(lambda: step.gradients([batch])) <= 0.75 * peak(at_once)


def test_parts_of_a_batch_hold_their_own_masked_words():
    tokens = torch.arange(12).view(4, 3)
    batch = dict(tokens=tokens, mlm_ids=torch.tensor([1, 5, 6, 10]), mlm_targets=torch.tensor([1, 5, 6, 10]))
    parts = train.split(batch, 2)
    for part in parts:
        assert torch.equal(part["tokens"].flatten()[part["mlm_ids"]], part["mlm_targets"])
    assert [part["mlm_ids"].tolist() for part in parts] == [[1, 5], [0, 4]]


def test_parts_are_halved_until_they_fit():
    tried = []

    def rehearse(count):
        tried.append(count)
        if 48 // count > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
    assert train.fitting(48, rehearse) == 6 and tried == [1, 2, 4, 8]
    assert train.fitting(48, lambda count: None) == 48
    with pytest.raises(torch.OutOfMemoryError):
        train.fitting(8 * 48, lambda count: (_ for _ in ()).throw(torch.OutOfMemoryError()))


def test_grad_checkpointing_gives_the_same_gradients_from_less_memory(monkeypatch):
    def run():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            return gradients("maskclip", 1)[0], sum(kept)
    plain, all_kept = run()
    monkeypatch.setattr(models.Block, "recompute", True)
    recomputed, few_kept = run()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())
    assert few_kept < 0.5 * all_kept


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


def test_a_resume_restores_the_random_state_and_settings_reach_the_blocks(shards, tmp_path):
    """No step draws from it today; who adds dropout will need it."""
    train.run(small(shards, tmp_path, steps=1))
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["rng"]["cpu"]
    torch.manual_seed(99)
    model = train.open_run(small(shards, tmp_path, grad_checkpointing=True), train.join(1)).model
    assert torch.equal(torch.get_rng_state(), saved)
    blocks = [module for module in model.modules() if isinstance(module, models.Block)]
    assert len(blocks) == 8 and all(block.recompute for block in blocks)


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
    train.run(small(folder, tmp_path / "run", force=True, steps=2))
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_resume_from_a_path(shards, tmp_path):
    train.run(small(shards, tmp_path / "a", steps=2))
    train.run(small(shards, tmp_path / "b", resume=str(tmp_path / "a/last.pt"), steps=3))
    assert [line["step"] for line in lines(tmp_path / "b")] == [3]
    train.run(small(shards, tmp_path / "b", resume=str(tmp_path / "a/last.pt"), steps=4))  # the same command goes on
    assert [line["step"] for line in lines(tmp_path / "b")] == [3, 4]
    with pytest.raises(ValueError, match="would overwrite the run in"):
        train.run(small(shards, tmp_path / "a", resume=str(tmp_path / "b/last.pt"), steps=5))
    with pytest.raises(FileNotFoundError):
        train.run(small(shards, tmp_path / "c", resume=str(tmp_path / "none.pt")))


def test_steps_that_are_not_finite_change_nothing_and_are_counted(shards, tmp_path, monkeypatch):
    """Step 3 has a loss of nan: weights and moments stay, the order goes on, the log says null and counts."""
    train.run(small(shards, tmp_path / "well", steps=2))
    term, calls = losses.mlm_loss, []

    def spoilt(*args):
        calls.append(None)
        return term(*args) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(losses, "mlm_loss", spoilt)
    train.run(small(shards, tmp_path / "spoilt", steps=3, keep=0))
    well, spoilt = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("well", "spoilt"))
    assert all(torch.equal(p, spoilt["model"][name]) for name, p in well["model"].items())
    for number, state in well["optimizer"]["state"].items():
        assert all(torch.equal(x, spoilt["optimizer"]["state"][number][name]) for name, x in state.items())
    log = lines(tmp_path / "spoilt")
    assert log[2]["mlm"] is None and log[2]["grad_norm"] is None and [line["skipped"] for line in log] == [0, 0, 1]
    assert "NaN" not in (tmp_path / "spoilt/log.jsonl").read_text()
    train.run(small(shards, tmp_path / "spoilt"))  # the count goes on too
    assert lines(tmp_path / "spoilt")[-1]["skipped"] == 1 and lines(tmp_path / "spoilt")[-1]["step"] == 8


def test_ten_steps_that_are_not_finite_stop_the_run_and_spare_the_checkpoint(shards, tmp_path, monkeypatch):
    train.run(small(shards, tmp_path, batch_size=4, steps=2))
    before = (tmp_path / "last.pt").read_bytes()
    plain, calls = losses.mlm_loss, []

    def spoilt(*args):
        calls.append(None)
        return plain(*args) * (math.nan if len(calls) <= 10 else 1)
    monkeypatch.setattr(losses, "mlm_loss", spoilt)
    with pytest.raises(ValueError, match="not finite in the last 10 steps up to step 12.*'mlm': nan.*"
                                         "last good checkpoint is .*last.pt of step 2"):
        train.run(small(shards, tmp_path, batch_size=4, log_every=4))
    calls.clear()
    with pytest.raises(ValueError, match="not finite in the last 10 steps up to step 14"):  # though others came after
        train.run(small(shards, tmp_path, batch_size=4, log_every=14))
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("precision,name", [("fp16", "fp16 on cpu"), ("bf16", "bf16 on cpu")])
def test_half_precision_follows_float32(shards, tmp_path, capsys, precision, name):
    """Losses within 2 % over 4 steps; fp16's loss scale, 65,536 at first, is in the log and in the checkpoint."""
    train.run(small(shards, tmp_path / "fp32", steps=4))
    train.run(small(shards, tmp_path / "half", precision=precision, steps=2))
    train.run(small(shards, tmp_path / "half", precision=precision, steps=4))
    assert name in capsys.readouterr().out
    for a, b in zip(lines(tmp_path / "fp32"), lines(tmp_path / "half"), strict=True):
        assert all(a[term] == pytest.approx(b[term], rel=0.02) for term in ("image", "text", "distill", "mlm"))
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.2)  # of the gradient itself, not of the scaled one
    assert lines(tmp_path / "fp32")[-1]["image"] != lines(tmp_path / "half")[-1]["image"]
    scale = 65536.0 if precision == "fp16" else None
    assert [line.get("loss_scale") for line in lines(tmp_path / "half")] == [scale] * 4
    scaler = torch.load(tmp_path / "half/last.pt", weights_only=True)["scaler"]
    assert (scaler["_growth_tracker"] == 4) if precision == "fp16" else scaler == {}


def test_a_step_that_overflows_in_fp16_is_skipped_and_halves_the_scale(shards, tmp_path, monkeypatch):
    plain = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **how: plain(device, init_scale=2.0 ** 30, **how))
    train.run(small(shards, tmp_path, precision="fp16", steps=4))
    skipped, scales = ([line[name] for line in lines(tmp_path)] for name in ("skipped", "loss_scale"))
    assert skipped[0] == 1 and 2.0 ** 29 in scales
    assert all(scale == 2.0 ** (30 - count) for scale, count in zip(scales, skipped))


def test_the_gradients_norm_is_cut(shards, tmp_path, monkeypatch):
    """A cut does nothing to Adam's direction, so SGD's is looked at: the step's length is lr times the cut norm."""
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(torch.nn.utils.get_total_norm(
        [p.grad for group in self.param_groups for p in group["params"]]).item()))
    train.run(small(shards, tmp_path / "free", steps=2))
    free, seen[:] = list(seen), []
    train.run(small(shards, tmp_path / "cut", steps=2, grad_clip=0.5))
    assert min(free) > 0.5 and seen == pytest.approx([0.5, 0.5], rel=1e-3)
    assert lines(tmp_path / "cut")[0]["grad_norm"] == pytest.approx(free[0], rel=1e-5)  # the log has it before the cut


@pytest.mark.slow
def test_compiled_blocks_train_alike(shards, tmp_path):
    train.run(small(shards, tmp_path / "eager", steps=3))
    run = start(["train.py"], "--data", shards, "--out", tmp_path / "compiled", "--epochs", 1, "--batch-size", 8,
                "--workers", 0, "--log-every", 1, "--vocab-size", 600, "--steps", 3, "--compile", "--micro-batch", 4)
    err = run.communicate(timeout=400)[1]
    assert run.returncode == 0 and "recompile_limit" not in err, err
    for a, b in zip(losses_of(tmp_path / "eager"), losses_of(tmp_path / "compiled"), strict=True):
        assert all(a[term] == pytest.approx(b[term], rel=1e-4) for term in ("image", "text", "distill", "mlm"))


def test_evaluation_compiles_nothing(shards, tmp_path, monkeypatch):
    """Its shapes are others than training's, and many."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward
    (tmp_path / "train").symlink_to(shards)
    (tmp_path / "classes").mkdir()
    opened = train.open_run(small(tmp_path / "train", tmp_path / "run"), train.join(1))
    block, x = opened.model.visual.blocks[0], torch.zeros(2, 5, 128, device=opened.place.device)
    block.compile(dynamic=False, backend=backend)
    monkeypatch.setattr(evaluate, "EVALUATIONS", dict(zeroshot=("classes", lambda *_: block(x.repeat(1, 2, 1)).shape)))
    assert train.evaluations(opened, ["zeroshot"]) == dict(zeroshot=(2, 10, 128)) and not compiled
    block(x)
    assert len(compiled) == 1


def test_memory_that_is_freed_is_kept_for_the_next_tensor():
    """Pages of 4 KiB that the system hands out for 80 MB, again and again, once they were there."""
    code = """if True:
        import resource, sys, torch, train
        train.join(1)
        def faults(n):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(n):
                torch.ones(20_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(faults(10), faults(20))"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                         env=os.environ | dict(CUDA_VISIBLE_DEVICES=""))
    first, again = map(int, run.stdout.split())
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("a C library other than glibc")
    assert again <= first  # else it is twice that


def test_a_line_of_the_log(shards, tmp_path):
    train.run(small(shards, tmp_path, steps=3, log_every=2))
    first, last = lines(tmp_path)
    assert list(first) == ["step", "epoch", "image", "text", "distill", "mlm", "accuracy", "scale",
                           "codeword_entropy", "codewords_used", "lr", "ema", "grad_norm", "skipped", "bad",
                           "pictures_per_s", "data_wait", "memory_gib"]
    assert (first["step"], last["step"], first["epoch"]) == (2, 3, 0.25) and first["ema"] == 0.99
    config = small(shards, tmp_path)
    assert last["lr"] == train.learning_rate(2, config, 8) and 0 <= last["accuracy"] <= 1
    assert 0 < last["data_wait"] < 1 and 0.1 < last["memory_gib"] < 20 and last["pictures_per_s"] > 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    made_by = state["made_by"]
    assert made_by["torch"] == torch.__version__ and len(made_by["commit"].removesuffix("-dirty")) == 40


def test_a_collapse_of_the_targets_shows_in_the_log(shards, tmp_path):
    """A teacher to which all patches look alike, and one to which they do not."""
    assert train.open_run(small(shards, tmp_path, method="clip"), train.join(1)).watch() == {}
    run = train.open_run(small(shards, tmp_path, codewords=64, micro_batch=4), train.join(1))
    batch = next(run.batches(3))
    batch.pop("bad", None)
    run.advance(batch)
    healthy = run.watch()
    hidden = batch["ids_hide"][..., None].expand(-1, -1, 128)
    features = run.teacher.visual(data.normalize(batch["images"]))[:, 1:].gather(1, hidden)
    targets = ((run.teacher.codewords(features) - run.teacher.center) / 0.04).softmax(-1).flatten(0, 1)     # (R, K)
    p, few = targets.mean(0).double(), len(targets.argmax(-1).unique())
    assert healthy == dict(codeword_entropy=pytest.approx(-(p * p.log()).sum().item(), rel=1e-4), codewords_used=few)
    assert healthy["codeword_entropy"] < math.log(64) and few > 8
    with torch.no_grad():
        run.teacher.visual.norm.weight.zero_()
        run.teacher.visual.norm.bias.fill_(1.0)
    assert run.watch()["codewords_used"] == 1


def test_what_is_ablated_reaches_the_model(shards, tmp_path):
    """Depths of image tower and text decoder, K, the patches that are distilled; 0 and -1 leave the preset's."""
    preset = train.make_model(small(shards, tmp_path), None, 600, None).config
    assert (preset.depth, preset.codewords, preset.text_decoder_depth, preset.distill) == (3, 512, 1, "hidden")
    config = small(shards, tmp_path, depth=2, codewords=33, text_decoder_depth=0, distill="all", steps=2, micro_batch=4)
    train.run(config)
    model, _ = evaluate.load_model(tmp_path / "last.pt")
    assert model.codewords.weight.shape == (33, 128) and not model.text_decoder.blocks
    assert len(model.visual.blocks) == 2 and model.config.distill == "all"
    with pytest.raises(ValueError, match="--codewords 33 there, 34 now"):
        train.run(small(shards, tmp_path, depth=2, codewords=34, text_decoder_depth=0, distill="all", force=True))
    with pytest.raises(ValueError, match="--depth 2 there, 3 now"):
        train.run(small(shards, tmp_path, depth=3, codewords=33, text_decoder_depth=0, distill="all", force=True))
    config = small(shards, tmp_path, depth=2, codewords=33, text_decoder_depth=0, force=True)  # to the hidden ones
    assert train.open_run(config, train.join(1)).model.config.distill == "hidden"


@pytest.mark.peers
def test_tensorboard_has_the_same_numbers(shards, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.run(small(shards, tmp_path, steps=2))
    train.run(small(shards, tmp_path, steps=3))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    got = [(event.step, event.value) for event in events.Scalars("distill")]
    assert got == [(line["step"], pytest.approx(line["distill"], rel=1e-6)) for line in lines(tmp_path)]


def test_curves_show_what_the_log_holds(shards, tmp_path):
    train.run(small(shards, tmp_path, epochs=2))
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"contrastive loss", "learning rate", "teacher's momentum", "image", "distill"} <= set(texts)
    assert "step 1" in texts and "step 16" in texts and "score while training" not in texts
    loss = next(element for element in root.iter("{http://www.w3.org/2000/svg}polyline"))
    points = [tuple(map(float, point.split(","))) for point in loss.attrib["points"].split()]
    values = [line["text"] for line in lines(tmp_path)]  # lines are drawn last first, so that the first lies on top
    assert len(points) == 16 and [x for x, _ in points] == sorted(x for x, _ in points)
    order = sorted(range(16), key=lambda i: -values[i])
    assert [points[i][1] for i in order] == sorted(points[i][1] for i in order)  # a higher loss stands higher
    records = [dict(step=1, image=2.0), dict(step=2, image=None), dict(step=3, image=2.0)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pictures.curves(tmp_path / "log.jsonl", tmp_path / "flat.svg")  # a constant, and a value that was not finite
    assert "nan" not in (tmp_path / "flat.svg").read_text()
    (tmp_path / "log.jsonl").write_text("")
    pictures.curves(tmp_path / "log.jsonl", tmp_path / "none.svg")
    assert ElementTree.parse(tmp_path / "none.svg").getroot().tag.endswith("svg")


# ---------------------------------------------------------------- weights to start from

def test_init_from_another_method_takes_what_fits(shards, tmp_path, capsys):
    train.run(small(shards, tmp_path / "clip", method="clip", steps=2))
    clip = torch.load(tmp_path / "clip/last.pt", weights_only=True)
    run = small(shards, tmp_path / "run", init=str(tmp_path / "clip/last.pt"), steps=1, lr=0.0)
    place = train.join(1)
    model = train.open_run(run, place).model
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in clip["model"].items())
    said = capsys.readouterr().out
    assert "fresh: codewords, image_decoder, text_decoder, vocabulary_bias" in said
    train.run(run)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["tokenizer"] == clip["tokenizer"]
    train.run(small(shards, tmp_path / "run", init=str(tmp_path / "clip/last.pt"), steps=2, lr=0.0))  # goes on
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_init_that_does_not_fit_is_told(shards, tmp_path):
    train.run(small(shards, tmp_path / "clip", method="clip", steps=1))
    with pytest.raises(ValueError, match="--init .*last.pt does not fit --model vit_b32: logit_scale|visual.*, here"):
        train.run(small(shards, tmp_path / "run", model="vit_b32", init=str(tmp_path / "clip/last.pt"), vocab_size=600))
    for depth in (2, 5):
        with pytest.raises(ValueError, match=f"does not fit --model tiny: an image tower of 3 blocks, here {depth}"):
            train.run(small(shards, tmp_path / "run", depth=depth, init=str(tmp_path / "clip/last.pt")))
    torch.save(dict(weight=torch.zeros(2)), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt holds no weights that are known here.*first keys are weight"):
        train.run(small(shards, tmp_path / "run", init=str(tmp_path / "other.pt")))
    with pytest.raises(FileNotFoundError):
        train.run(small(shards, tmp_path / "run", init=str(tmp_path / "none.pt")))
    x = torch.zeros(1)
    for odd in ({0: x}, dict(state_dict=[1]), dict(model_config={}), {"visual.conv1.weight": x, "text_projection": x}):
        torch.save(odd, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt holds no weights that are known here"):
            train.run(small(shards, tmp_path / "run", init=str(tmp_path / "other.pt")))
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match="program.pt holds no weights that are known here"):
        train.run(small(shards, tmp_path / "run", init=str(tmp_path / "program.pt")))
    assert not (tmp_path / "run").exists()


@pytest.mark.peers
def test_weights_of_open_clip_start_a_run(tmp_path):
    """From its pixels theirs, from ours ours: the difference of the two normalisations is in the patch embedding."""
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.create_model("ViT-B-32").eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    config = train.TrainConfig(model="vit_b32", method="maskclip", init=str(tmp_path / "theirs.pt"))
    ours = train.make_model(config, train.join(1), 49409, evaluate.read_weights(config.init)).eval()
    pixels = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a dog", "two teddy bears in the snow, seen from afar"])
    with torch.no_grad():
        image = theirs.encode_image(data.normalize(pixels, evaluate.CLIP_MEAN, evaluate.CLIP_STD))
        assert torch.allclose(ours.encode_image(data.normalize(pixels)), image, atol=1e-4)
        assert torch.allclose(ours.encode_text(tokens), theirs.encode_text(tokens), atol=1e-4)


def test_shards_in_val_do_not_fail_a_trained_run(shards, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.copytree(shards, tmp_path / part)
    train.run(small(tmp_path / "train", tmp_path / "run"))
    assert "retrieval not evaluated: no karpathy.json" in capsys.readouterr().out


def test_a_signal_to_all_processes_saves_and_the_same_command_goes_on(shards, tmp_path):
    number = signal.SIGINT
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
    sentence = "20 bad pairs in a row" if what == "an error" else "a loader process ended"
    assert run.returncode == 1 and sentence in error


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
    (["--data", "SHARDS", "--micro-batch", "3", "--batch-size", "8"], "--micro-batch 3 does not divide 8, a rank's"),
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
    (["--retrieval", "EMPTY"], "no karpathy.json"), (["--dense", "EMPTY"], "no segmentation set"),
    (["--zeroshot", "EMPTY"], "no test set"), (["--linear", "EMPTY"], "no train set"),
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


# ---------------------------------------------------------------- on a GPU

def values(out, *names):
    return np.array([[line[name] for name in names] for line in lines(out)])


@pytest.mark.gpu
def test_bf16_and_compiled_blocks_follow_float32_on_cuda(tmp_path):
    """300 demo steps: bf16's losses, means over 50, differ from float32's by no more than another seed's do."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    data._draw_shard(folder, 0, 2000, 0)

    def curve(name, **changes):
        train.run(small(folder, tmp_path / name, epochs=10, batch_size=64, steps=300, workers=8,
                        vocab_size=1024, **changes))
        return values(tmp_path / name, "image", "text", "distill", "mlm").reshape(6, 50, 4).mean(1)
    fp32, noise = curve("fp32", precision="fp32"), curve("seed", precision="fp32", seed=1)
    for name, changes in dict(bf16=dict(precision="bf16"), compiled=dict(precision="bf16", compile=True)).items():
        gap, spread = abs(curve(name, **changes) - fp32).mean(0), abs(noise - fp32).mean(0)
        assert (gap <= np.maximum(spread, 0.01 * fp32.mean(0))).all(), (name, gap, spread)


@pytest.mark.gpu
def test_a_share_that_does_not_fit_is_taken_in_parts_on_cuda(shards, tmp_path, capsys):
    """ViT-B/16, 64 pairs, in half of what they need: the parts are found, and the losses are those of the whole."""
    given = dict(model="vit_b16", batch_size=64, precision="fp32", steps=2, epochs=3)
    train.run(small(shards, tmp_path / "whole", **given))
    peak = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((0.5 * peak + total // 10) / total)
        train.run(small(shards, tmp_path / "parts", **given))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "pairs do not fit on the GPU" in capsys.readouterr().out
    names = ("image", "text", "distill", "mlm")
    assert values(tmp_path / "parts", *names) == pytest.approx(values(tmp_path / "whole", *names), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("part", [8, 4])
@pytest.mark.parametrize("method", models.METHODS)
def test_no_step_waits_for_the_gpu_but_those_that_log(shards, tmp_path, monkeypatch, method, part):
    """Steps 3 and 4 of 5 run with waiting forbidden; only the first, the last and what is logged may wait."""
    plain = train.Stop.__call__

    def stop(self):  # asked at each step's end
        self.steps = getattr(self, "steps", 0) + 1
        torch.cuda.set_sync_debug_mode("error" if self.steps in (2, 3) else "default")
        return plain(self)
    monkeypatch.setattr(train.Stop, "__call__", stop)
    train.run(small(shards, tmp_path, method=method, steps=5, log_every=100, micro_batch=part))
