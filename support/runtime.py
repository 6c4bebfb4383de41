"""What a run stands on: ranks, signals, the log, and how a program ends.

Ideas: DINO, MAE (torchrun's environment).
"""
import contextlib
import ctypes
import datetime
import fcntl
import gc
import io
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, schedulers, SLURM


# ---------------------------------------------------------------- ranks

@dataclass
class Ranks:
    """This process among those of the run."""
    rank: int
    world_size: int
    device: torch.device
    store: object = None        # a dictionary that all ranks share
    host_group: object = None   # lets the CPUs exchange small things while the GPUs work
    n_calls: int = 0            # of on_rank0


def init_distributed(timeout_minutes=10.0):
    """Join the ranks that torchrun's environment names, or run alone.  -> Ranks

    No rank waits longer than timeout_minutes for another.  Raises ValueError if this rank has no
    GPU, ConnectionError if the ranks do not meet.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"local rank {device.index} has no GPU, because only "
                             f"{torch.cuda.device_count()} are visible: start as many processes on "
                             "a machine as it has GPUs, and let each see all of them")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, as in matrix products
    else:
        keep_freed_memory()
    if world_size == 1:
        return Ranks(rank, world_size, device)
    limit = datetime.timedelta(minutes=timeout_minutes)
    try:
        store = next(dist.rendezvous("env://", timeout=limit))[0]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=limit)
        host_group = dist.new_group(backend="gloo", timeout=limit)
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(f"cannot meet the other {world_size - 1} ranks at {address} within "
                              f"{timeout_minutes} minutes: {sentence_of(error)}") from error
    return Ranks(rank, world_size, device, store, host_group)


def keep_freed_memory():
    """Make malloc keep what is freed, instead of taking it from the system again, page by page.

    Measured on ViT-B/16 steps of batch 8 on two cores: MaskCLIP takes 10 % less time, CLIP 5 %.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):        # glibc
        libc.mallopt(-4, 0)             # M_MMAP_MAX: nothing from mmap, which gives back at once
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: the heap's end only above 2 GiB


def print0(text):
    """Print a line on rank 0, at once, also into a file."""
    if os.environ.get("RANK", "0") == "0":
        safe_print(text)


def safe_print(text):
    """Print a line; a full disk or a closed pipe does not end a run of weeks."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def on_rank0(function, ranks):
    """Call function() on rank 0 alone.  -> its value on all ranks

    The others poll without a time limit, because an evaluation can take long.
    """
    if ranks.world_size == 1:
        return function()
    ranks.n_calls += 1
    key = f"on_rank0/{ranks.n_calls}"
    if ranks.rank == 0:
        ranks.store.set(key, pickle.dumps(function()))
    while not ranks.store.check([key]):
        time.sleep(0.2)
    value = pickle.loads(ranks.store.get(key))
    dist.barrier(ranks.host_group)  # rank 0 may hold the store: it stays until all have read
    return value


def rank0_first(function, ranks):
    """Call function() on rank 0 and then on the others, which see what it wrote.  -> its value"""
    value = function() if ranks.rank == 0 else None
    on_rank0(lambda: None, ranks)  # the others wait for it
    return value if ranks.rank == 0 else function()


def peak_memory_gib():
    """The most memory that this process has had: the GPU's if there is one, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ---------------------------------------------------------------- signals

class SignalHandler:
    """SIGINT, SIGTERM or SIGUSR1 on any rank stops all ranks after the same step.

    A second signal ends the process at once.
    """

    def __init__(self, ranks):
        self.group = ranks.host_group
        self.name = ""          # of the signal that this rank has received
        self.received_at = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number, _):
        """Note a signal.

        A second one within two seconds is taken for the same, because a scheduler signals all
        processes and torchrun passes it on to its own.
        """
        if self.name and time.monotonic() - self.received_at > 2:
            os._exit(128 + number)
        if not self.name:
            self.name = signal.Signals(number).name
            self.received_at = time.monotonic()

    def stop_requested(self):
        """Whether to stop after this step: one answer on all ranks, which call this once a step."""
        flag = torch.tensor(float(bool(self.name)))
        if self.group is not None:
            dist.all_reduce(flag, group=self.group)  # by the CPUs: no GPU is waited for
        return bool(flag)

    def reason(self, stopped):
        """Why a run ends early, for messages.  stopped: as stop_requested has answered"""
        if stopped:
            return self.name or "a signal to another rank"
        return "--steps"

    def restore(self):
        """Give the signals their usual effect back."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------- precision and gradients

def autocast(precision, device):
    """-> the autocast context, the gradient scaler (which acts in fp16 alone), the precision"""
    kind = device.type
    if precision == "auto":
        precision = "bf16" if kind == "cuda" else "fp32"
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[precision]
    amp = torch.autocast(kind, dtype, enabled=precision != "fp32")
    return amp, torch.amp.GradScaler(kind, enabled=precision == "fp16"), precision


def sync_gradients(student, wanted):
    """DDP averages over the ranks in the LAST backward pass of a step, all that is in .grad."""
    if isinstance(student, DistributedDataParallel) and not wanted:
        return student.no_sync()
    return contextlib.nullcontext()


# ---------------------------------------------------------------- the log

def lock(file, sentence):
    """Lock an open file until it is closed.  Raises ValueError if another process has locked it."""
    os.register_at_fork(after_in_child=file.close)  # a child must not hold the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{sentence}: give another --out") from error
    except OSError:
        pass  # a file system without locks


class Log:
    """log.jsonl, which one run at a time may write, and TensorBoard's file if that is installed."""

    def __init__(self, out):
        Path(out).mkdir(parents=True, exist_ok=True)
        self.out = Path(out)
        self.path = self.out / "log.jsonl"
        self.waiting = b""  # lines that a full disk has refused
        self.tensorboard = None
        self.file = open(self.path, "ab", buffering=0)
        lock(self.file, f"another run is writing to {out}")

    def truncate(self, step):
        """Cut off what an interrupted run wrote after `step`.  ValueError if the file is no log."""
        end = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"line {number} of {self.path} is not a line of a log: mend it or "
                                 "move the file away") from error
            end += len(line)
        self.file.truncate(end)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(self.out, purge_step=step + 1)
        except ImportError:
            pass

    def write(self, record):
        """Write one line.  A number that is not finite becomes null, as JSON has no word for it.

        A full disk is a warning: the line waits, and is written with the next one.
        """
        for name, x in record.items():
            if isinstance(x, float) and not math.isfinite(x):
                record = record | {name: None}
        self.waiting += json.dumps(record).encode() + b"\n"
        try:
            self.flush()
            for name, x in record.items():
                if self.tensorboard and isinstance(x, (int, float)):
                    self.tensorboard.add_scalar(name, x, record["step"])
        except OSError as error:
            print0(f"warning: {self.path} is not written, its lines wait: {error}")

    def flush(self, to_disk=False):
        """Write the lines that wait.  Raises OSError.

        to_disk: before a checkpoint is saved, because it may not be ahead of its log.
        """
        while self.waiting:
            written = self.file.write(self.waiting)
            self.waiting = self.waiting[written:]
        if to_disk:
            os.fsync(self.file.fileno())

    def close(self):
        """Give up the lock."""
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()


class Meter:
    """Speed and memory between two lines of the log."""

    def __init__(self, batch_size, stop_at):
        self.batch_size = batch_size
        self.stop_at = stop_at  # step at which the run ends
        self.restart()

    def restart(self):
        """Begin anew, after a line of the log: an evaluation before it does not count."""
        self.started = time.time()
        self.waited = 0.0
        self.steps = 0

    def next(self, batches):
        """The next batch; the time that it lets the loop wait is counted."""
        start = time.time()
        try:
            batch = next(batches)
        except ConnectionError as error:  # its pipe breaks before the signal arrives
            raise OSError("a loader process was killed, probably for lack of memory: give fewer "
                          "--workers") from error
        self.waited += time.time() - start
        self.steps += 1
        return batch

    def read(self, step, values):
        """Print a line.  -> pictures (or pairs) per second, share of waiting for data, memory"""
        seconds = time.time() - self.started
        speed = self.steps * self.batch_size / seconds
        text = " ".join(f"{name} {x:.2f}" for name, x in values.items())
        minutes = (self.stop_at - step) * self.batch_size / speed / 60
        print0(f"step {step}/{self.stop_at} {text}, {speed:.0f} pictures/s, "
               f"{minutes:,.0f} min left")
        return dict(pictures_per_s=round(speed, 1), data_wait=round(self.waited / seconds, 3),
                    memory_gib=round(peak_memory_gib(), 2))


# ---------------------------------------------------------------- how a program ends

def sentence_of(error):
    """The last line of an error's message: a loader process sends its whole traceback before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("ValueError: ") if lines else type(error).__name__


def run_program(name, function):
    """Call function(); what a user can mend becomes one sentence and exit status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a name need not be in its encoding
    status = 1
    label = f"{name}: rank {os.environ['RANK']}" if "RANK" in os.environ else name
    try:
        function()
        status = 0
    except (OSError, ValueError) as error:
        print(f"{label}: error: {sentence_of(error)}", file=sys.stderr, flush=True)
    except torch.OutOfMemoryError as error:
        hint = "give a smaller --micro-batch or --batch-size, or --grad-checkpointing"
        reason = str(error).partition(". ")[0]
        print(f"{label}: error: out of GPU memory: {hint} ({reason})", file=sys.stderr, flush=True)
    except KeyboardInterrupt:  # outside the loop, which has its own way to stop
        print(f"{label}: interrupted", file=sys.stderr, flush=True)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # what could not be printed must not change the exit status
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for a killed loader
        workers = torch.multiprocessing.active_children()
        for worker in workers:
            worker.kill()  # the loader's processes ignore SIGTERM
        if dist.is_initialized() and status == 0:
            gc.collect()  # DDP holds the group; gloo's threads must end before the interpreter does
            dist.destroy_process_group()
    if dist.is_initialized() or workers:
        # The end of the group would wait for ranks that may be gone, and the end of a loader for a
        # lock that its process may have held when it was killed.
        os._exit(status)
    sys.exit(status)
