"""What a week-long run survives: README's table of faults, a test for each row."""
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import losses_of

import data
import evaluate
import train

ROOT = Path(__file__).parent.parent
EPOCHS, STEPS = 3, 24  # 64 pairs in batches of 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """64 pairs in train/, and 8 test pictures of two classes beside it."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "train").mkdir()
    data._draw_shard(folder / "train", 0, 64, 0)
    for name in ("red star", "blue circle"):
        (folder / "classes/test" / name).mkdir(parents=True)
        for i, (content, _) in enumerate(data.Pairs([str(folder / "train")])[0, k] for k in range(4)):
            (folder / "classes/test" / name / f"{i}.png").write_bytes(content)
    return folder


def arguments(world, out, **changes):
    """The command line of a run of 24 steps."""
    given = dict(data=world / "train", out=out, epochs=EPOCHS, batch_size=8, workers=0, log_every=1, vocab_size=600,
                 eval_every=1) | changes
    return [str(word) for name, value in given.items() for word in ("--" + name.replace("_", "-"), value)]


def start(arguments, fault="", ranks=0, tmp_path=None, options=()):
    """train.py in a process of its own, or under torchrun, after the lines `fault` have changed something in it."""
    code = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import train\n{fault}\ntrain.main()\n"
    command = [sys.executable, "-c", code]
    if ranks:
        (tmp_path / "faulty.py").write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
                   *(options or ["--standalone"]), str(tmp_path / "faulty.py")]
    return subprocess.Popen([*command, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(run, timeout=240):
    out, err = run.communicate(timeout=timeout)
    return run.returncode, out, err


def steps_of(out):
    return [line["step"] for line in losses_of(out)]


def wait_for_step(run, out, step):
    while not (Path(out) / "log.jsonl").is_file() or step not in steps_of(out):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The log and the last checkpoint of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(arguments(world, out)))[0] == 0
    assert steps_of(out) == list(range(1, STEPS + 1)) and "zeroshot" in losses_of(out)[7]
    return losses_of(out), torch.load(out / "last.pt", weights_only=True)


def assert_as_undisturbed(out, undisturbed):
    """The same log, bit for bit, no step twice and none missing; the same weights, moments and counters."""
    log, state = undisturbed
    assert losses_of(out) == log
    mine = torch.load(out / "last.pt", weights_only=True)
    for part in ("model", "teacher"):
        assert all(torch.equal(x, mine[part][name]) for name, x in state[part].items())
    for number, moments in state["optimizer"]["state"].items():
        assert all(torch.equal(x, mine["optimizer"]["state"][number][name]) for name, x in moments.items())
    assert all(mine[name] == state[name] for name in ("step", "bad", "best", "skipped", "in_a_row"))


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
HALF_A_CHECKPOINT = """
plain = train.torch.save
def save(state, file):
    if state["step"] == 16:
        plain(state, file); file.flush(); file.truncate(file.tell() // 2); {then}
    plain(state, file)
train.torch.save = save
"""


SECOND_NAME = f"""
plain = os.replace
def replace(a, b):
    if "epoch-2" in str(b):
        plain(a, b); {KILL}
    plain(a, b)
os.replace = replace
"""
LAST_NAME = f"""
plain = os.replace
def replace(a, b):
    if "last.pt" in str(b) and os.path.exists(b): {KILL}
    plain(a, b)
os.replace = replace
"""
EVALUATION = f"""
plain, calls = train.evaluate.zeroshot_classifier, []
def classifier(*args):
    calls.append(0)
    if len(calls) == 2: {KILL}
    return plain(*args)
train.evaluate.zeroshot_classifier = classifier
"""
HALF_A_LINE = f"""
plain = train.Log.write
def write(self, record):
    if record["step"] == 13:
        self.file.write(b'{{"step": 13, '); self.file.flush(); {KILL}
    plain(self, record)
train.Log.write = write
"""


@pytest.mark.parametrize("moment,fault", [
    ("half a checkpoint is written", HALF_A_CHECKPOINT.format(then=KILL)),
    pytest.param("a checkpoint has one of its names", SECOND_NAME, marks=pytest.mark.slow),
    pytest.param("last.pt is about to be renamed", LAST_NAME, marks=pytest.mark.slow),
    pytest.param("an evaluation is under way", EVALUATION, marks=pytest.mark.slow),
    pytest.param("a line of the log is half written", HALF_A_LINE, marks=pytest.mark.slow)])
def test_kill_9(world, tmp_path, undisturbed, moment, fault):
    """Killed at the worst moments, started again: as if nothing had happened."""
    code, _, err = finish(start(arguments(world, tmp_path), fault))
    assert code == -signal.SIGKILL, err
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert saved == 8  # of epoch 1; the one of epoch 2 was not to be
    code, out, err = finish(start(arguments(world, tmp_path)))
    assert code == 0 and f"going on from step {saved} of" in out, err
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow
def test_kill_9_with_loader_processes(world, tmp_path, undisturbed):
    """Killed from outside in mid-epoch, with workers that had read ahead; saved by the clock in between."""
    given = arguments(world, tmp_path, workers=2, save_minutes=0)
    run = start(given)
    wait_for_step(run, tmp_path, 11)
    run.kill()
    finish(run)
    code, out, err = finish(start(given))
    assert code == 0 and int(re.search(r"going on from step (\d+)", out)[1]) >= 10, err
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_step_saves_and_exits_with_0(world, tmp_path, undisturbed, name):
    run = start(arguments(world, tmp_path))
    wait_for_step(run, tmp_path, 3)
    run.send_signal(getattr(signal, name))
    code, out, err = finish(run)
    assert code == 0 and f"{name}: stopped after step" in out and "the same command goes on from" in out, err
    done = steps_of(tmp_path)[-1]
    assert done < STEPS and torch.load(tmp_path / "last.pt", weights_only=True)["step"] == done
    assert finish(start(arguments(world, tmp_path)))[0] == 0
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_second_signal_exits_at_once(world, tmp_path):
    fault = "import time\nplain = train.Step.gradients\ntrain.Step.gradients = lambda *a: (time.sleep(9), plain(*a))[1]"
    run = start(arguments(world, tmp_path), fault)
    while not (tmp_path / "log.jsonl").is_file():
        time.sleep(0.1)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    time.sleep(2.5)  # sooner, it would pass for the same one
    before = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert finish(run)[0] == 128 + signal.SIGTERM and time.monotonic() - before < 2


def test_a_crash_between_the_names_of_a_checkpoint_does_not_let_the_next_one_write_over_it(tmp_path, monkeypatch):
    plain = os.replace

    def crash(a, b):
        if b.name == "last.pt":
            raise KeyboardInterrupt
        plain(a, b)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        train.save(tmp_path, dict(step=1), ["epoch-1.pt", "best.pt"])
    monkeypatch.setattr(os, "replace", plain)
    train.save(tmp_path, dict(step=2))
    assert [torch.load(tmp_path / name)["step"] for name in ("epoch-1.pt", "best.pt", "last.pt")] == [1, 1, 2]


# ---------------------------------------------------------------- disks

class SmallDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = content[:self.room]
        self.room -= len(taken)
        return self.file.write(taken)

    def fileno(self):
        return self.file.fileno()


def test_a_log_on_a_full_disk_waits_for_room_and_no_checkpoint_goes_ahead_of_it(tmp_path):
    log = train.Log(tmp_path)
    log.go_on(0)
    log.file = disk = SmallDisk(log.file, 30)
    for step in range(1, 6):
        log.write(dict(step=step, lr=0.5))
    with pytest.raises(OSError):
        log.sync()
    disk.room = 10 ** 6
    log.write(dict(step=6, lr=0.5))
    log.sync()
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_save_that_fails_does_not_lose_the_best(world, tmp_path, monkeypatch):
    plain, calls = train.save, []

    def save(*args):
        calls.append(None)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        plain(*args)
    monkeypatch.setattr(train, "save", save)
    monkeypatch.setattr(evaluate, "accuracy", lambda scores, targets: 0.5)  # each epoch as good as the first
    train.run(train.parse(arguments(world, tmp_path)))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 16

FULL_ONCE = HALF_A_CHECKPOINT.format(then="""
        if state["step"] == 16: raise OSError(28, "No space left on device")""")


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_no_step(world, tmp_path, undisturbed):
    code, out, err = finish(start(arguments(world, tmp_path), FULL_ONCE))
    assert code == 0 and "warning: step 16 is not saved, next try in 20.0 minutes: cannot write" in out, err
    assert "No space left on device" in out
    assert not (tmp_path / "last.partial").exists() and not (tmp_path / "epoch-2.pt").exists()
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_an_error_and_spares_the_old_checkpoint(world, tmp_path):
    """A true failing write: no file of this process may grow beyond 5 MB, a fifth of a checkpoint."""
    assert finish(start(arguments(world, tmp_path, steps=3)))[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({5 * 10 ** 6}, {resource.RLIM_INFINITY}))"
    code, _, err = finish(start(arguments(world, tmp_path, steps=6), limit))
    assert code == 1 and "train.py: error: cannot write" in err and "File too large" in err and "Traceback" not in err
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "last.partial").exists()


def test_a_disk_that_is_too_small_is_told_before_the_run(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50 * 10 ** 6)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match="5 checkpoints of 0.02 GB do not fit in .*, where 0.05 GB are free"):
        train.run(train.parse(arguments(world, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- used folders, other and damaged checkpoints

@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_and_an_older_one_goes_on(world, tmp_path, undisturbed):
    assert finish(start(arguments(world, tmp_path)))[0] == 0
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100_000])
    older = tmp_path / "epoch-2.pt"
    sentence = f"last.pt is not a checkpoint.* older ones are .*{older}.*: --resume one of them with --force"
    with pytest.raises(ValueError, match=sentence):
        train.run(train.parse(arguments(world, tmp_path)))
    again = [*arguments(world, tmp_path, resume=older, steps=20), "--force"]
    code, out, err = finish(start(again))
    assert code == 0 and "going on from step 16" in out, err
    assert torch.load(older, weights_only=True)["step"] == 16
    code, out, err = finish(start([*arguments(world, tmp_path, resume=older), "--force"]))  # not back to 16
    assert code == 0 and f"going on from step 20 of {tmp_path / 'last.pt'}" in out, err
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(world, tmp_path):
    first = start(arguments(world, tmp_path, epochs=400, eval_every=0, workers=1))
    wait_for_step(first, tmp_path, 9)
    code, _, err = finish(start(arguments(world, tmp_path, epochs=400, eval_every=0, workers=1)))
    assert code == 1 and f"another run is writing to {tmp_path}: give another --out" in err
    first.kill()  # its loader is still there for some seconds
    first.wait()
    train.Log(tmp_path).go_on(10 ** 6)
    assert steps_of(tmp_path) == list(range(1, len(steps_of(tmp_path)) + 1))


def test_the_last_epochs_and_the_best_are_kept(world, tmp_path):
    train.run(train.parse(arguments(world, tmp_path, epochs=4, keep=2)))
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["best.pt", "epoch-3.pt", "epoch-4.pt", "last.pt"]
    scores = [line["zeroshot"] for line in losses_of(tmp_path) if "zeroshot" in line]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert len(scores) == 4 and best["best"] == max(scores) and best["step"] == 8 * (1 + scores.index(max(scores)))
    model, tokenizer = evaluate.load_model(tmp_path / "best.pt")
    assert evaluate.zeroshot(model, tokenizer, world / "classes/test")["scores"]["top-1"] == max(scores)


def test_the_last_epoch_counts_though_its_last_pairs_fill_no_batch(world, tmp_path):
    train.run(train.parse(arguments(world, tmp_path, epochs=2, batch_size=24)))  # 5 steps take 120 of 128 pairs
    assert [("zeroshot" in line, line["step"]) for line in losses_of(tmp_path)] == [
        (False, 1), (False, 2), (True, 3), (False, 4), (True, 5)]
    assert {"epoch-1.pt", "epoch-2.pt"} <= {file.name for file in tmp_path.glob("*.pt")}


def test_the_best_score_outlives_a_resume(world, tmp_path):
    train.run(train.parse(arguments(world, tmp_path, steps=8)))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(state | dict(best=1.0), tmp_path / "last.pt")  # as if it could not be better
    before = (tmp_path / "best.pt").read_bytes()
    train.run(train.parse(arguments(world, tmp_path)))
    assert (tmp_path / "best.pt").read_bytes() == before and state["best"] > 0


def test_checkpoints_without_a_last_one_are_not_taken_over(world, tmp_path):
    train.run(train.parse(arguments(world, tmp_path, steps=16)))
    (tmp_path / "last.pt").unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds .*epoch-1.pt.*epoch-2.pt.* but no last.pt: --resume one of them"):
        train.run(train.parse(arguments(world, tmp_path)))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    train.run(train.parse(arguments(world, tmp_path, resume=tmp_path / "epoch-1.pt", steps=9)))
    assert steps_of(tmp_path) == list(range(1, 10))


def test_only_old_checkpoints_and_those_of_a_run_taken_back_are_deleted(tmp_path):
    for name in ("epoch-1.pt", "epoch-2.pt", "epoch-3.pt", "epoch-7.pt", "epoch-10.pt", "epoch-2-good.pt", "best.pt"):
        (tmp_path / name).touch()
    train.prune(tmp_path, 3, 2)
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == ["best.pt", "epoch-2-good.pt", "epoch-2.pt", "epoch-3.pt"]


def test_what_is_no_checkpoint_is_one_sentence_with_its_name(tmp_path):
    """Empty, zeros, text, noise, and a true one that was cut or has noise in it."""
    rng, path = np.random.default_rng(0), tmp_path / "last.pt"
    torch.save(dict(model_config={}, x=torch.zeros(100)), path)
    whole = path.read_bytes()
    spoilt = [b"", bytes(20000), b"x" * 9999, b"\x80\x02X\x01", *(rng.bytes(5000) for _ in range(200)),
              *(b"\x80\x02" + rng.bytes(300) for _ in range(3000)), *(whole[:n] for n in range(0, len(whole), 50))]
    for _ in range(200):
        at = rng.integers(len(whole) - 8)
        spoilt.append(whole[:at] + rng.bytes(8) + whole[at + 8:])
    told = 0
    for content in spoilt:
        path.write_bytes(content)
        try:
            evaluate.read_checkpoint(path)
        except ValueError as error:
            told += str(path) in str(error)
    assert told > 500  # noise in a tensor is not seen


@pytest.mark.parametrize("line", ["5", "[1]", '{"step": null}', "{}", "{"])
def test_a_log_that_is_none_is_told(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl is none of a log"):
        train.Log(tmp_path).go_on(3)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n' + line + "\n"


def test_force_goes_on_with_other_settings_but_not_with_another_model(world, tmp_path):
    train.run(train.parse(arguments(world, tmp_path, steps=2)))
    with pytest.raises(ValueError, match="--lr 0.001 there, 0.5 now.*--force to go on with the new ones"):
        train.run(train.parse(arguments(world, tmp_path, lr=0.5)))
    with pytest.raises(ValueError, match=r"\(--method maskclip there, clip now\): give another --out$"):
        train.run(train.parse([*arguments(world, tmp_path, method="clip"), "--force"]))
    train.run(train.parse([*arguments(world, tmp_path, lr=0.0, weight_decay=0.7, beta1=0.5, steps=3), "--force"]))
    assert [line["lr"] for line in losses_of(tmp_path)][2] < 1e-5
    groups = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0] and groups[0]["betas"] == (0.5, 0.98)


# ---------------------------------------------------------------- several ranks

def torchrun(world, tmp_path, out, ranks, fault="", options=(), **changes):
    return start(arguments(world, out, **changes), fault, ranks, tmp_path, options)


def assert_close(a, b, steps):
    """Two runs, one log but for rounding, and weights within 1e-4."""
    a_log, b_log = losses_of(a), losses_of(b)
    assert [line["step"] for line in b_log] == steps and len(a_log) == len(b_log)
    for x, y in zip(a_log, b_log):
        rounding = ("grad_norm",)  # a sum over all gradients, some of them all but zero
        assert {k: v for k, v in x.items() if k not in rounding} == pytest.approx(
            {k: v for k, v in y.items() if k not in rounding}, rel=1e-5, abs=1e-7)
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    for name, p in a["model"].items():
        other = b["model"][name]
        if name.endswith("qkv.bias"):  # a key's bias does nothing; its gradient is rounding, scaled up by Adam
            p, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (p, other))
        assert torch.allclose(p, other, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["maskclip", "slip"])
def test_1_2_and_4_processes_and_parts_of_their_shares_are_equal(world, tmp_path, method):
    """20 steps, losses to 1e-5, weights to 1e-4."""
    given = dict(method=method, batch_size=32, epochs=10, steps=20, eval_every=0)
    assert finish(start(arguments(world, tmp_path / "1", **given)))[0] == 0
    for ranks, size in ((2, 0), (4, 0), (1, 8), (2, 4)):
        out = tmp_path / f"{ranks}-{size}"
        code, _, err = finish(torchrun(world, tmp_path, out, ranks, micro_batch=size, **given))
        assert code == 0, err
        assert_close(tmp_path / "1", out, list(range(1, 21)))


@pytest.mark.slow
def test_from_two_ranks_to_one_and_back(world, tmp_path):
    """Another number of processes goes on at the very next pair."""
    assert finish(start(arguments(world, tmp_path / "1")))[0] == 0
    assert finish(torchrun(world, tmp_path, tmp_path / "2", 2, steps=5))[0] == 0
    assert finish(start(arguments(world, tmp_path / "2", steps=11)))[0] == 0
    code, _, err = finish(torchrun(world, tmp_path, tmp_path / "2", 2))
    assert code == 0, err
    assert_close(tmp_path / "1", tmp_path / "2", list(range(1, STEPS + 1)))


@pytest.mark.slow
def test_a_nan_on_one_rank_skips_the_step_on_both(world, tmp_path):
    fault = """
plain, calls = train.losses.mlm_loss, []
def spoilt(*args):
    calls.append(0)
    return plain(*args) * (float("nan") if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
train.losses.mlm_loss = spoilt
"""
    code, _, err = finish(torchrun(world, tmp_path, tmp_path / "run", 2, fault, steps=3))
    assert code == 0, err
    assert [line["skipped"] for line in losses_of(tmp_path / "run")] == [0, 0, 1]
    assert finish(torchrun(world, tmp_path, tmp_path / "well", 2, steps=2))[0] == 0
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("run", "well"))
    assert all(torch.equal(p, b[name]) for name, p in a.items())


@pytest.mark.slow
def test_a_test_picture_that_cannot_be_read_fails_no_rank(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world/classes/test/red star/1.png").write_bytes(b"no picture")
    code, out, err = finish(torchrun(tmp_path / "world", tmp_path, tmp_path / "run", 2))
    assert code == 0 and out.count("zeroshot not evaluated: cannot read the picture") == EPOCHS + 1, err
    assert steps_of(tmp_path / "run") == list(range(1, STEPS + 1))


def by_hand(ranks, arguments_of):
    """Ranks without torchrun, as srun starts them: each by its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments_of(rank)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | dict(
                                 RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                                 MASTER_PORT=port)) for rank in range(ranks)]


@pytest.mark.slow
def test_an_out_folder_that_is_not_shared_is_told(world, tmp_path):
    """Rank 0 would go on from step 3, rank 1 from none."""
    assert finish(start(arguments(world, tmp_path / "0", steps=3)))[0] == 0
    ends = [finish(run) for run in by_hand(2, lambda rank: arguments(world, tmp_path / str(rank)))]
    assert all(code == 1 and "must be the same folders on all nodes" in err for code, _, err in ends), ends


@pytest.mark.slow
def test_a_hanging_rank_0_that_keeps_the_store_is_named_too(world, tmp_path):
    runs = by_hand(2, lambda rank: arguments(world, tmp_path / "run", epochs=400, eval_every=0, timeout_minutes=0.1))
    wait_for_step(runs[0], tmp_path / "run", 3)
    runs[0].send_signal(signal.SIGSTOP)
    code, _, err = finish(runs[1], 60)
    runs[0].kill()
    assert code == 1 and "train.py: rank 1: error: lost rank 0 (" in err


def rank_of(run, rank):
    """The process of a rank under torchrun."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return int(next(pid for pid in children if f"RANK={rank}".encode() in
                    Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")))


@pytest.mark.slow
def test_sigterm_to_a_rank_under_torchrun_saves_once_and_exits_with_0(world, tmp_path):
    run = torchrun(world, tmp_path, tmp_path / "run", 2, epochs=400, eval_every=0)
    wait_for_step(run, tmp_path / "run", 3)
    os.kill(rank_of(run, 1), signal.SIGTERM)
    code, out, err = finish(run)
    assert code == 0 and out.count("the same command goes on from") == 1, err
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == steps_of(tmp_path / "run")[-1]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once(world, tmp_path):
    """torchrun hands it on and waits; its own status says that it was signalled."""
    run = torchrun(world, tmp_path, tmp_path / "run", 2, epochs=400, eval_every=0)
    wait_for_step(run, tmp_path / "run", 3)
    run.send_signal(signal.SIGTERM)
    code, out, _ = finish(run)
    assert code != 0 and out.count("SIGTERM: stopped after step") == 1
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == steps_of(tmp_path / "run")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number,sentence", [
    (signal.SIGKILL, "rank      : 1 (local_rank: 1)\n  exitcode  : -9"),  # torchrun's own table
    (signal.SIGSTOP, "train.py: rank 0: error: lost rank 1 (")])
def test_a_rank_that_dies_or_hangs_ends_the_job_with_its_name(world, tmp_path, number, sentence):
    run = torchrun(world, tmp_path, tmp_path / "run", 2, epochs=400, eval_every=0, timeout_minutes=0.1)
    wait_for_step(run, tmp_path / "run", 3)
    os.kill(rank_of(run, 1), number)
    code, _, err = finish(run, 90)
    assert code != 0 and sentence in err and "train.py" in err


@pytest.mark.slow
def test_torchrun_restarts_a_job_whose_rank_was_killed(world, tmp_path, monkeypatch):
    """--max-restarts: the job goes on by itself, and its log is whole."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else a warning says so
    fault = f"""
plain = train.Step.gradients
def gradients(*args):
    first = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.path.exists({str(tmp_path / "run/epoch-1.pt")!r}): {KILL}
    return plain(*args)
train.Step.gradients = gradients
"""
    run = torchrun(world, tmp_path, tmp_path / "run", 2, fault, ["--standalone", "--max-restarts=1"],
                   timeout_minutes=0.5)
    code, out, err = finish(run)
    assert code == 0 and "going on from step 8" in out and "after a restart" not in out, err
    assert steps_of(tmp_path / "run") == list(range(1, STEPS + 1))


# ---------------------------------------------------------------- the mission's command, on the CPU

def yfcc(root, layout):
    """300 pairs in a true layout of YFCC-15M: shards of img2dataset, or SLIP's zips and a table of data.py yfcc."""
    folder = root / "yfcc15m"
    folder.mkdir(parents=True)
    if layout == "shards":
        for number in range(3):
            data._draw_shard(folder, 0, 100, number)
        return
    source = root / "drawn"
    source.mkdir()
    data._draw_shard(source, 0, 300, 0)
    pairs, rows = data.Pairs([str(source)]), ["image\turl\ttitle\tdescription"]
    for index in range(300):
        content, captions = pairs[0, index]
        name = f"images/{index // 150:02d}/{index // 30:03d}.zip"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / name, "a") as zipped:
            zipped.writestr(f"{index}.jpg", content)
        rows.append(f"{name}/{index}.jpg\thttp://x/{index}\t{captions[0]}\t")
    (folder / "yfcc15m.tsv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shards", "zips"])
def test_the_missions_command_eight_ranks_one_log_one_checkpoint(tmp_path, layout):
    yfcc(tmp_path, layout)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8", ROOT / "train.py",
               "--data", "yfcc15m", "--root", tmp_path, "--model", "tiny", "--steps", 4]
    code, out, err = finish(subprocess.Popen([*map(str, command)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE))
    assert code == 0 and "batches of 256" in out and "batch 256 = 8 x 32" in out, err
    run = tmp_path / "runs/yfcc15m-maskclip"
    assert steps_of(run) == [4] and torch.load(run / "last.pt", weights_only=True)["step"] == 4
    assert out.count("stopped after --steps 4 of 29") == 1


@pytest.mark.slow
def test_two_nodes_of_four_ranks(tmp_path):
    """--nnodes=2 as two torchruns that meet on the loopback."""
    yfcc(tmp_path, "shards")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1"]
    given = ["--data", "yfcc15m", "--root", tmp_path, "--model", "tiny", "--steps", 4, "--out", tmp_path / "run"]
    nodes = [start(list(map(str, given)), "", 4, tmp_path, options) for _ in range(2)]
    ends = [finish(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2] + ends[1][2]
    assert steps_of(tmp_path / "run") == [4] and sum(out.count("8 x 32") for _, out, _ in ends) == 1


@pytest.mark.slow
def test_slurms_way_without_torchrun(world, tmp_path):
    """README's script: each task is a rank by its environment; a notice to all, exit 0, the words to look for."""
    runs = by_hand(2, lambda rank: arguments(world, tmp_path / "run", epochs=400, eval_every=0))
    wait_for_step(runs[0], tmp_path / "run", 3)
    for run in runs:
        run.send_signal(signal.SIGUSR1)
    ends = [finish(run) for run in runs]
    assert [code for code, _, _ in ends] == [0, 0] and "stopped after step" in ends[0][1], ends
