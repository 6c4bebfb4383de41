"""What a week-long run survives: kill -9, signals, disks, used folders, damaged files, ranks."""
import argparse
import math
import os
import pickle
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
from helpers import (ROOT, draw_pairs, finish, log_lines, run_training, same_weights, saved,
                     spoil_pictures, start, wait_for_step)

import data
import evaluate
import train
from support import checkpoints, runtime

STEPS = 24  # 3 epochs of 64 pairs in batches of 8
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """64 pairs in train/, and 8 test pictures of two classes next to it."""
    folder = tmp_path_factory.mktemp("world")
    draw_pairs(folder / "train")
    pairs = data.Pairs([str(folder / "train")])
    for name in ("red star", "blue circle"):
        (folder / "classes/test" / name).mkdir(parents=True)
        for i in range(4):
            (folder / "classes/test" / name / f"{i}.png").write_bytes(pairs[i][0])
    return folder


def arguments(world, out, **changes):
    """The command line of a run of 24 steps."""
    given = dict(data=world / "train", recipe="demo", out=out, epochs=3, batch_size=8, workers=0,
                 log_every=1, vocab_size=600, eval_every=1) | changes
    words = ["train.py"]
    for name, value in given.items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    return words


def steps_of(out):
    return [line["step"] for line in log_lines(out)]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The log and the last checkpoint of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, _, err = finish(start(*arguments(world, out)))
    assert code == 0, err
    assert steps_of(out) == list(range(1, STEPS + 1)) and "zeroshot" in log_lines(out)[7]
    return log_lines(out), saved(out)


def assert_as_undisturbed(out, undisturbed):
    """The same log, bit for bit, no step twice and none missing; the same weights and counters."""
    log, state = undisturbed
    assert log_lines(out) == log
    mine = saved(out)
    assert same_weights(state, mine)
    for name in ("step", "bad", "best", "skipped", "in_a_row"):
        assert mine[name] == state[name]


# ---------------------------------------------------------------- killed

FAULTS = {
    "half a checkpoint is written": """
plain = train.torch.save
def save(state, file):
    if state["step"] == 16:
        plain(state, file); file.flush(); file.truncate(file.tell() // 2); KILL
    plain(state, file)
train.torch.save = save""",
    "a checkpoint has one of its names": """
plain = os.replace
def replace(a, b):
    plain(a, b)
    if "epoch-2" in str(b): KILL
os.replace = replace""",
    "an evaluation is under way": """
plain, calls = train.evaluate.zeroshot_classifier, []
def classifier(*args):
    calls.append(0)
    if len(calls) == 2: KILL
    return plain(*args)
train.evaluate.zeroshot_classifier = classifier""",
    "a line of the log is half written": """
from support import runtime
plain = runtime.Log.write
def write(self, record):
    if record["step"] == 13:
        self.file.write(b'{"step": 13, '); self.file.flush(); KILL
    plain(self, record)
runtime.Log.write = write"""}


@slow
@pytest.mark.parametrize("moment", FAULTS)
def test_kill_9(world, tmp_path, undisturbed, moment):
    """Killed at the worst moments, started again: as if nothing had happened."""
    out = tmp_path / "run"
    fault = FAULTS[moment].replace("KILL", KILL)
    code, _, err = finish(start(*arguments(world, out), fault=fault, folder=tmp_path))
    assert code == -signal.SIGKILL, err
    assert saved(out)["step"] == 8  # of epoch 1; the one of epoch 2 was not to be
    code, _, err = finish(start(*arguments(world, out)))
    assert code == 0, err
    assert_as_undisturbed(out, undisturbed)


@slow
def test_kill_9_with_loader_processes(world, tmp_path, undisturbed):
    """Killed from outside in mid-epoch, with workers that had read ahead."""
    given = arguments(world, tmp_path, workers=2)
    process = start(*given)
    wait_for_step(process, tmp_path, 11)
    process.kill()
    finish(process)
    code, _, err = finish(start(*given))
    assert code == 0, err
    assert_as_undisturbed(tmp_path, undisturbed)


# ---------------------------------------------------------------- signals

@slow
def test_ctrl_c_saves_and_the_same_command_resumes(world, tmp_path, undisturbed):
    """The loader's workers get the signal too.  SIGTERM and SIGUSR1: on several ranks, below."""
    process = start(*arguments(world, tmp_path, workers=2), start_new_session=True)
    wait_for_step(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0 and "SIGINT: stopped after step" in out, err
    done = steps_of(tmp_path)[-1]
    assert done < STEPS and saved(tmp_path)["step"] == done
    code, out, err = finish(start(*arguments(world, tmp_path)))
    assert code == 0 and f"step {done} of" in out, err
    assert_as_undisturbed(tmp_path, undisturbed)


@slow
def test_a_second_signal_exits_at_once(world, tmp_path):
    fault = """
import time
plain = train.to_device
train.to_device = lambda *a: (time.sleep(9), plain(*a))[1]"""
    process = start(*arguments(world, tmp_path / "run"), fault=fault, folder=tmp_path)
    while not (tmp_path / "run/log.jsonl").is_file():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)  # sooner, it would pass for the same one
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM and time.monotonic() - before < 3


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


def test_a_log_on_a_full_disk_waits_and_no_checkpoint_goes_ahead_of_it(tmp_path):
    log = runtime.Log(tmp_path)
    log.truncate(0)
    log.file = disk = SmallDisk(log.file, 30)
    for step in range(1, 6):
        log.write(dict(step=step, lr=0.5))
    with pytest.raises(OSError):
        log.flush(to_disk=True)
    state = dict(step=5, in_a_row=0, scaler={}, model={})
    assert not checkpoints.try_save(tmp_path, state, [], log, must=False)
    assert not (tmp_path / "last.pt").exists()
    disk.room = 10 ** 6
    log.write(dict(step=6, lr=0.5))
    assert checkpoints.try_save(tmp_path, state, [], log, must=True)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


@slow
def test_a_disk_that_is_full_for_a_while_costs_no_step(world, tmp_path, undisturbed):
    fault = """
plain, failed = train.torch.save, []
def save(state, file):
    if state["step"] == 16 and not failed:
        failed.append(0)
        raise OSError(28, "No space left on device")
    plain(state, file)
train.torch.save = save"""
    out = tmp_path / "run"
    code, said, err = finish(start(*arguments(world, out), fault=fault, folder=tmp_path))
    assert code == 0 and "step 16 is not saved" in said, err
    assert not (out / "last.partial").exists() and not (out / "epoch-2.pt").exists()
    assert_as_undisturbed(out, undisturbed)


@slow
def test_a_disk_that_is_full_at_the_end_is_an_error_and_spares_the_checkpoint(world, tmp_path):
    """A true failing write: no file of this process may grow beyond 5 MB."""
    out = tmp_path / "run"
    assert finish(start(*arguments(world, out, steps=3)))[0] == 0
    before = (out / "last.pt").read_bytes()
    fault = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (5 * 10 ** 6, -1))"
    process = start(*arguments(world, out, steps=6), fault=fault, folder=tmp_path)
    code, _, err = finish(process)
    assert code == 1 and "cannot write" in err and "Traceback" not in err
    assert (out / "last.pt").read_bytes() == before and not (out / "last.partial").exists()


def test_a_crash_between_the_names_of_a_checkpoint_spares_the_older_ones(tmp_path, monkeypatch):
    plain = os.replace

    def crash(a, b):
        if b.name == "last.pt":
            raise KeyboardInterrupt
        plain(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save_checkpoint(tmp_path, dict(step=1), ["epoch-1.pt", "best.pt"])
    checkpoints.save_checkpoint(tmp_path, dict(step=2))
    steps = [saved(tmp_path, name)["step"] for name in ("epoch-1.pt", "best.pt", "last.pt")]
    assert steps == [1, 1, 2]


def test_a_run_whose_last_steps_are_not_finite_does_not_end_well(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train.losses, "mlm_loss", lambda logits, *_: logits.sum() * math.nan)
    with pytest.raises(ValueError, match="step 2 is not saved"):
        run_training(world / "train", tmp_path, steps=2)
    assert saved(tmp_path)["step"] == 0


# ---------------------------------------------------------------- used folders, damaged files

@slow
def test_a_damaged_checkpoint_is_an_error_and_an_older_one_resumes(world, tmp_path, undisturbed):
    given = dict(epochs=3, eval_every=1)
    run_training(world / "train", tmp_path, **given)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100_000])
    older = tmp_path / "epoch-2.pt"
    with pytest.raises(ValueError, match=f"last.pt is not a checkpoint.*{older}"):
        run_training(world / "train", tmp_path, **given)
    given |= dict(resume=str(older), force=True)
    log = run_training(world / "train", tmp_path, steps=20, **given)
    assert log[-1]["step"] == 20 and saved(tmp_path, "epoch-2.pt")["step"] == 16
    run_training(world / "train", tmp_path, **given)  # not back to 16
    assert len(saved(tmp_path)["made_by"]) == 3
    assert_as_undisturbed(tmp_path, undisturbed)


@slow
def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path):
    given = arguments(world, tmp_path, epochs=400, eval_every=0, workers=1)
    first = start(*given)
    wait_for_step(first, tmp_path, 9)
    code, _, err = finish(start(*given))
    assert code == 1 and "another run" in err
    first.kill()  # its loader is still there for some seconds, without the lock
    first.wait()
    runtime.Log(tmp_path).close()
    assert steps_of(tmp_path) == list(range(1, len(steps_of(tmp_path)) + 1))


@slow
def test_the_last_epochs_and_the_best_are_kept_and_the_best_outlives_a_resume(world, tmp_path):
    given = dict(epochs=4, eval_every=1)
    log = run_training(world / "train", tmp_path, **given)
    names = sorted(file.name for file in tmp_path.glob("*.pt"))
    assert names == ["best.pt", "epoch-3.pt", "epoch-4.pt", "last.pt"]
    scores = [line["zeroshot"] for line in log if "zeroshot" in line]
    best = saved(tmp_path, "best.pt")
    assert len(scores) == 4 and best["best"] == max(scores)
    assert best["step"] == 8 * (1 + scores.index(max(scores)))
    model, tokenizer = evaluate.load_model(tmp_path / "best.pt")
    result = evaluate.zeroshot(model, tokenizer, world / "classes/test")
    assert result["scores"]["top-1"] == max(scores)

    run_training(world / "train", tmp_path / "again", steps=8, **given)
    torch.save(saved(tmp_path / "again") | dict(best=1.0), tmp_path / "again/last.pt")
    before = (tmp_path / "again/best.pt").read_bytes()
    run_training(world / "train", tmp_path / "again", **given)
    assert (tmp_path / "again/best.pt").read_bytes() == before


@slow
def test_the_last_epoch_counts_though_its_last_pairs_fill_no_batch(world, tmp_path):
    log = run_training(world / "train", tmp_path, epochs=2, batch_size=24, eval_every=1)
    assert [line["step"] for line in log if "zeroshot" in line] == [3, 5]  # 120 of 128 pairs
    assert {"epoch-1.pt", "epoch-2.pt"} <= {file.name for file in tmp_path.glob("*.pt")}


@slow
def test_checkpoints_without_a_last_one_are_not_taken_over(world, tmp_path):
    run_training(world / "train", tmp_path, epochs=3, steps=16)
    (tmp_path / "last.pt").unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="epoch-1.pt"):
        run_training(world / "train", tmp_path, epochs=3)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    run_training(world / "train", tmp_path, epochs=3, resume=str(tmp_path / "epoch-1.pt"), steps=9)
    assert steps_of(tmp_path) == list(range(1, 10))


def test_only_old_checkpoints_and_those_of_a_run_taken_back_are_deleted(tmp_path):
    for name in ("epoch-1", "epoch-2", "epoch-3", "epoch-7", "epoch-10", "epoch-2-good", "best"):
        (tmp_path / f"{name}.pt").touch()
    checkpoints.prune_checkpoints(tmp_path, 3, 2)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["best.pt", "epoch-2-good.pt", "epoch-2.pt", "epoch-3.pt"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_checkpoint_is_one_sentence_with_its_name(tmp_path):
    """Empty, zeros, text, noise, and a true one that was cut or has noise in it."""
    rng, path = np.random.default_rng(0), tmp_path / "last.pt"
    torch.save(dict(model_config={}, x=torch.zeros(100)), path)
    content = path.read_bytes()
    files = [b"", bytes(20000), b"x" * 9999, b"\x80\x02X\x01"]
    files += [rng.bytes(5000) for _ in range(100)]
    files += [b"\x80\x02" + rng.bytes(300) for _ in range(1000)]
    files += [content[:n] for n in range(0, len(content), 50)]
    for _ in range(100):
        at = rng.integers(len(content) - 8)
        files.append(content[:at] + rng.bytes(8) + content[at + 8:])
    refused = 0
    for file in files:
        path.write_bytes(file)
        try:
            checkpoints.load_checkpoint(path)
        except ValueError as error:
            refused += str(path) in str(error)
    assert refused > 1200


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was-run",)
    torch.save(dict(model=Evil()), tmp_path / "evil.pt")
    for protocol in (0, 2, 5):
        (tmp_path / f"{protocol}.pt").write_bytes(pickle.dumps(Evil(), protocol))
    for name in ("evil.pt", "0.pt", "2.pt", "5.pt"):
        with pytest.raises(ValueError, match=f"{name} would run code"):
            checkpoints.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "was-run").exists()


def test_what_training_scripts_save_next_to_weights_is_read(tmp_path):
    facts = dict(a=np.float64(1.5), b=np.int64(2), c=np.bool_(True), d=np.float32(3),
                 args=argparse.Namespace(out=Path("/x/y"), lr=1))
    torch.save(facts, tmp_path / "a.pt")
    state = checkpoints.load_checkpoint(tmp_path / "a.pt")
    assert (state["a"], state["b"], state["c"], state["d"]) == (1.5, 2, True, 3)
    assert str(state["args"].out) == "/x/y"


def test_a_flipped_bit_and_a_huge_pickle_are_seen(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save(dict(x=torch.arange(5000.0)), path)
    content = bytearray(path.read_bytes())
    at = content.index(torch.arange(2000.0, 2010.0).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["x"].shape == (5000,)  # nobody else looks
    with pytest.raises(ValueError, match="a.pt.*damaged.*data/0"):
        checkpoints.load_checkpoint(path)
    monkeypatch.setattr(checkpoints, "MOST_PICKLED", 5000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(5001))
    with pytest.raises(ValueError, match="5,001 bytes"):
        checkpoints.load_checkpoint(path)


@pytest.fixture(scope="module")
def one_step(world, tmp_path_factory):
    """The folder of a run of one step."""
    out = tmp_path_factory.mktemp("one")
    run_training(world / "train", out, steps=1)
    return out


@pytest.mark.parametrize("change", [
    dict(step="three"), dict(optimizer=None), dict(config=3), dict(model_config=None),
    dict(model=torch.ones(1)), dict(made_by="x"), dict(teacher={"odd": torch.ones(1)})])
def test_a_checkpoint_whose_parts_are_missing_or_odd_is_an_error(world, one_step, tmp_path, change):
    state = saved(one_step) | change
    torch.save({name: x for name, x in state.items() if x is not None}, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="last.pt"):
        run_training(world / "train", tmp_path, steps=2)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_log_without_its_checkpoint_is_not_cut(world, tmp_path):
    run_training(world / "train", tmp_path, steps=2)
    (tmp_path / "last.pt").unlink()
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="no last.pt"):
        run_training(world / "train", tmp_path, method="clip")
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_streak_of_bad_steps_saves_and_deletes_nothing(tmp_path, capsys):
    log = runtime.Log(tmp_path)
    good = dict(step=3, in_a_row=torch.tensor(1), scaler={}, model=dict(w=torch.ones(2)))
    assert checkpoints.try_save(tmp_path, good, [], log, must=False)
    for bad in (dict(in_a_row=torch.tensor(2)), dict(model=dict(w=torch.tensor([1, math.nan])))):
        state = good | dict(step=4) | bad
        assert not checkpoints.try_save(tmp_path, state, ["epoch-1.pt"], log, must=False)
        assert "step 4 is not saved" in capsys.readouterr().out
        with pytest.raises(ValueError, match="step 4 is not saved"):  # a run does not end well so
            checkpoints.try_save(tmp_path, state, ["epoch-1.pt"], log, must=True)
    assert saved(tmp_path)["step"] == 3 and not (tmp_path / "epoch-1.pt").exists()
    log.close()


@slow
@pytest.mark.parametrize("target,encoding", [("/dev/full", "utf-8"), ("closed", "utf-8"),
                                             ("file", "ascii:strict")])
def test_what_cannot_be_printed_does_not_end_a_run(world, tmp_path, target, encoding):
    """stdout on a full disk, a closed pipe, and in ASCII with a name that is not."""
    out = tmp_path / "läuft"
    command = [sys.executable, *map(str, arguments(world, out, steps=2, vocab_size=520))]
    reading, writing = os.pipe()
    os.close(reading)
    stdout = dict(closed=writing).get(target) or open("/dev/full" if "/" in target else
                                                      tmp_path / "printed", "wb")
    run = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True,
                         env=os.environ | dict(PYTHONIOENCODING=encoding, OMP_NUM_THREADS="1"))
    assert run.returncode == 0, run.stderr
    assert saved(out)["step"] == 2
    if target == "file":
        assert "l\\xe4uft" in (tmp_path / "printed").read_text("ascii")


def test_a_killed_loader_is_named():
    def batches():
        raise ConnectionResetError(104, "Connection reset by peer")
        yield
    with pytest.raises(OSError, match="loader process was killed"):
        runtime.Meter(8, 10).next(batches())


@pytest.mark.parametrize("line", ["5", "[1]", '{"step": null}', "{}", "{"])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        runtime.Log(tmp_path).truncate(3)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n' + line + "\n"


@pytest.mark.parametrize("message,sentence", [
    ("", "ValueError"), ("one\ntwo\n\n", "two"), ("Traceback\nValueError: bad", "bad")])
def test_the_sentence_of_an_error(message, sentence):
    assert runtime.sentence_of(ValueError(message)) == sentence


def test_memory_is_in_gib_on_macos_too(monkeypatch):
    here = runtime.peak_memory_gib()
    monkeypatch.setattr(runtime.sys, "platform", "darwin")  # which counts bytes, not KiB
    assert here / runtime.peak_memory_gib() == pytest.approx(1024, rel=0.1)


# ---------------------------------------------------------------- loaders

@slow
@pytest.mark.parametrize("what", ["an error", "a killed worker"])
def test_a_run_ends_when_its_workers_do(tmp_path, what):
    """What a worker raises, or its death, must not leave a process that waits for ever."""
    draw_pairs(tmp_path / "pairs")
    if what == "an error":
        spoil_pictures(tmp_path / "pairs/00000.tar")
    process = start("train.py", "--data", tmp_path / "pairs", "--recipe", "demo", "--out",
                    tmp_path / "run", "--workers", 2, "--batch-size", 8, "--epochs", 500,
                    "--vocab-size", 600)
    if what == "a killed worker":
        wait_for_step(process, tmp_path / "run", 10)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            os.kill(int(file.read().split()[0]), signal.SIGKILL)
    code, _, err = finish(process, 60)
    assert code == 1 and ("in a row" if what == "an error" else "DataLoader worker") in err


# ---------------------------------------------------------------- several ranks

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_hand(ranks, arguments_of):
    """Ranks without torchrun, as srun starts them: each by its environment."""
    shared = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return [start(*arguments_of(rank), env=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank in range(ranks)]


def rank0_process(rank, port, folder):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    ranks = runtime.init_distributed(1.0)
    for call in range(3):
        def function(call=call):
            path = folder / f"{call}"
            if rank == 0:
                time.sleep(0.3)
                path.touch()
            return path.exists()
        assert runtime.rank0_first(function, ranks)
    torch.distributed.barrier()  # rank 0 holds the store
    torch.distributed.destroy_process_group()


@slow
def test_rank_0_goes_first_more_than_once(tmp_path):
    torch.multiprocessing.spawn(rank0_process, (free_port(), tmp_path), nprocs=2)
    assert len(list(tmp_path.iterdir())) == 3


def assert_close(one, two, steps):
    """Two runs, one log but for rounding, and weights within 1e-4."""
    one_log, two_log = log_lines(one), log_lines(two)
    assert [line["step"] for line in two_log] == steps and len(one_log) == len(two_log)
    for x, y in zip(one_log, two_log):
        for name in x.keys() - {"grad_norm", "bad_pairs", "codeword_entropy", "codewords_used"}:
            assert x[name] == pytest.approx(y[name], rel=1e-5, abs=1e-7), name
    one, two = saved(one)["model"], saved(two)["model"]
    for name, p in one.items():
        other = two[name]
        if name.endswith("qkv.bias"):  # a key's bias does nothing; Adam scales its rounding up
            p, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (p, other))
        assert torch.allclose(p, other, atol=1e-4), name


@slow
def test_1_2_and_4_processes_and_parts_of_their_shares_are_equal(world, tmp_path):
    """Ten steps, losses to 1e-5, weights to 1e-4."""
    given = dict(batch_size=32, epochs=5, steps=10, eval_every=0)
    assert finish(start(*arguments(world, tmp_path / "1", **given)))[0] == 0
    for ranks, size in ((4, 0), (2, 4)):
        out = tmp_path / f"{ranks}-{size}"
        code, _, err = finish(start(*arguments(world, out, micro_batch=size, **given), ranks=ranks))
        assert code == 0, err
        assert_close(tmp_path / "1", out, list(range(1, 11)))


@slow
def test_from_two_ranks_to_one_and_back(world, tmp_path):
    """Another number of processes resumes at the very next pair."""
    run_training(world / "train", tmp_path / "1", epochs=3, steps=12)
    out = tmp_path / "2"
    assert finish(start(*arguments(world, out, steps=5, eval_every=0), ranks=2))[0] == 0
    run_training(world / "train", out, epochs=3, steps=9)
    code, _, err = finish(start(*arguments(world, out, steps=12, eval_every=0), ranks=2))
    assert code == 0, err
    assert_close(tmp_path / "1", out, list(range(1, 13)))


@slow
def test_a_nan_on_one_rank_skips_the_step_on_both(world, tmp_path):
    fault = """
plain, calls = train.losses.mlm_loss, []
def spoilt(*args):
    calls.append(0)
    return plain(*args) * (float("nan") if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
train.losses.mlm_loss = spoilt"""
    run, well = tmp_path / "run", tmp_path / "well"
    code, _, err = finish(start(*arguments(world, run, steps=3), fault=fault, folder=tmp_path,
                                ranks=2))
    assert code == 0, err
    assert [line["skipped"] for line in log_lines(run)] == [0, 0, 1]
    assert finish(start(*arguments(world, well, steps=2), ranks=2))[0] == 0
    assert same_weights(saved(run), saved(well))


@slow
def test_an_out_folder_that_is_not_shared_is_an_error(world, tmp_path):
    """Rank 0 would resume from step 3, rank 1 from none."""
    assert finish(start(*arguments(world, tmp_path / "0", steps=3)))[0] == 0
    processes = by_hand(2, lambda rank: arguments(world, tmp_path / str(rank)))
    ends = [finish(process) for process in processes]
    assert all(code == 1 and "same folders" in err for code, _, err in ends), ends


def process_of_rank(process, rank):
    """The process of a rank under torchrun."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = file.read().split()
    for pid in children:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if f"RANK={rank}".encode() in file.read().split(b"\0"):
                return int(pid)
    raise LookupError(rank)


@slow
@pytest.mark.parametrize("receiver", ["a rank", "torchrun"])
def test_sigterm_under_torchrun_saves_once(world, tmp_path, receiver):
    process = start(*arguments(world, tmp_path, epochs=400, eval_every=0), ranks=2)
    wait_for_step(process, tmp_path, 3)
    if receiver == "a rank":
        os.kill(process_of_rank(process, 1), signal.SIGTERM)
    else:  # which hands it on and waits; its own status says that it was signalled
        process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code == 0) == (receiver == "a rank") and out.count("stopped after step") == 1, err
    assert saved(tmp_path)["step"] == steps_of(tmp_path)[-1]


@slow
def test_a_rank_that_dies_ends_the_job_with_its_name(world, tmp_path):
    process = start(*arguments(world, tmp_path, epochs=400, eval_every=0), ranks=2)
    wait_for_step(process, tmp_path, 3)
    os.kill(process_of_rank(process, 1), signal.SIGKILL)
    code, _, err = finish(process, 90)
    assert code != 0 and "exitcode  : -9" in err  # torchrun's own table


@slow
def test_torchrun_restarts_a_job_whose_rank_was_killed(world, tmp_path):
    """--max-restarts: the job resumes by itself, and its log is complete."""
    fault = f"""
plain = train.to_device
def to_device(*args):
    first = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.path.exists({str(tmp_path / "run/epoch-1.pt")!r}): {KILL}
    return plain(*args)
train.to_device = to_device"""
    process = start(*arguments(world, tmp_path / "run"), fault=fault, folder=tmp_path, ranks=2,
                    options=("--standalone", "--max-restarts=1"),
                    env=dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    code, out, err = finish(process)
    assert code == 0 and "resumes from step 8" in out, err
    assert steps_of(tmp_path / "run") == list(range(1, STEPS + 1))


@slow
def test_two_nodes_run_the_papers_command(tmp_path):
    """--data yfcc15m on 300 pairs; --nnodes=2 as two torchruns that meet on the loopback."""
    for number in range(3):
        draw_pairs(tmp_path / "yfcc15m", 100, number)
    options = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=1",
               f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    given = ["train.py", "--data", "yfcc15m", "--root", tmp_path, "--model", "tiny", "--steps", 4,
             "--out", tmp_path / "run", "--batch-size", 256, "--vocab-size", 600]
    nodes = [start(*given, ranks=2, options=options) for _ in range(2)]
    ends = [finish(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2] + ends[1][2]
    assert steps_of(tmp_path / "run") == [4] and sum("4 x 64" in out for _, out, _ in ends) == 1


@slow
def test_slurms_way_without_torchrun(world, tmp_path):
    """Each task is a rank by its environment; a notice to all, exit status 0."""
    processes = by_hand(2, lambda rank: arguments(world, tmp_path, epochs=400, eval_every=0))
    wait_for_step(processes[0], tmp_path, 3)
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [0, 0] and "stopped after step" in ends[0][1], ends


def test_a_program_does_not_wait_for_a_loader_whose_process_it_killed(capsys, monkeypatch):
    statuses = []

    def fail():
        batches = iter(torch.utils.data.DataLoader(range(99), num_workers=1,
                                                   worker_init_fn=data.ignore_signals))
        next(batches)
        cycle = [batches]
        cycle.append(cycle)  # so that the loader outlives the error
        raise ValueError("word")
    monkeypatch.setattr(os, "_exit", statuses.append)
    with pytest.raises(SystemExit):
        runtime.run_program("program", fail)
    assert "error: word" in capsys.readouterr().err
    assert statuses == [1]
