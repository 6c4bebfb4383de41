"""One door for the tests: pairs and shards made, a run started, faults injected, a small model."""
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train
from model import PRESETS
from support import demo, shards

torch.set_num_threads(1)  # for models as small as these, threads cost more than they give
ROOT = Path(__file__).parent.parent
SMALL = replace(PRESETS["tiny"], image_size=32, width=32, depth=2, heads=4, embed_dim=16,
                vocab_size=60, text_width=32, text_depth=2, text_heads=4, codewords=12,
                ssl_hidden=16, ssl_dim=8)  # 16 patches
MEASURED = ("pictures_per_s", "data_wait", "memory_gib")  # what the clock says


# ---------------------------------------------------------------- data

def draw_pairs(folder, n=64, number=0):
    """A folder with one shard of n demo pairs.  -> folder"""
    Path(folder).mkdir(parents=True, exist_ok=True)
    demo.draw_shard(Path(folder), 0, n, number)
    return Path(folder)


def picture_bytes(colour="red", size=(8, 8), kind="PNG"):
    """A picture file of one colour (a name or RGB), or of an array (H, W, 3) uint8."""
    if isinstance(colour, np.ndarray):
        image = Image.fromarray(colour)
    else:
        image = Image.new("RGB", size, colour)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members):
    """A tar of [(name, bytes)], for example [("0.png", ...), ("0.txt", b"a dog")].  -> path"""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            shards.add_member(tar, name, content)
    return Path(path)


def spoil_pictures(path, every=1):
    """Overwrite the beginning of every n-th picture of a shard."""
    content = bytearray(Path(path).read_bytes())
    with tarfile.open(path) as tar:
        pictures = [member for member in tar if not member.name.endswith(".txt")]
    for member in pictures[::every]:
        content[member.offset_data:member.offset_data + 30] = bytes(30)
    Path(path).write_bytes(content)


def batch_of(config, n=3, length=7, hidden=12, seed=0):
    """A batch as a model's forward reads it, with random pixels and tokens."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, config.image_size, config.image_size, generator=g)
    order = torch.rand(n, config.grid ** 2, generator=g).argsort(1)
    tokens = torch.randint(1, config.vocab_size - 3, (n, length), generator=g)
    tokens[:, 0], tokens[:, -1] = config.vocab_size - 3, config.vocab_size - 2
    tokens[0, -3:] = torch.tensor([config.vocab_size - 2, 0, 0])  # a shorter text
    ids = torch.tensor([1, length + 2])
    masked = tokens.flatten().index_fill(0, ids, config.vocab_size - 1).view_as(tokens)
    return dict(images=images, views=torch.randn(n, 2, *images.shape[1:], generator=g),
                tokens=tokens, ids_hide=order[:, :hidden].sort().values,
                ids_keep=order[:, hidden:].sort().values, mlm_tokens=masked, mlm_ids=ids,
                mlm_targets=tokens.flatten()[ids])


# ---------------------------------------------------------------- runs

def small_config(shards, out, **changes):
    """The settings of a run of 8 steps of 8 pairs."""
    given = dict(data=[str(shards)], recipe="demo", out=str(out), epochs=1, batch_size=8, workers=0,
                 log_every=1, vocab_size=600)
    constants = {name: changes.pop(name) for name in list(changes)
                 if name in ("save_minutes", "keep", "bad_limit", "grad_clip", "depth",
                             "text_decoder_depth", "crop_min", "mlm_ratio")}
    return replace(train.make_config(given | changes), **constants)


def run_training(shards, out, **changes):
    """Run it in this process.  -> the lines of its log"""
    train.train(small_config(shards, out, **changes))
    return log_lines(out)


def log_lines(out):
    """The log of a run, without what the clock says.  -> list of dicts"""
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in MEASURED}
            for line in lines]


def saved(out, name="last.pt"):
    """A checkpoint of a run."""
    return torch.load(Path(out) / name, weights_only=True)


def start(*arguments, fault="", ranks=0, folder=None, options=("--standalone",), **popen):
    """A program of ours as a user starts it: start("train.py", "--steps", 3).  -> Popen

    fault: Python lines that change something in its process first; ranks: under torchrun, with
    `options`; folder: where the changed program is written.
    """
    program, *arguments = map(str, arguments)
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *options]
    if fault:
        module = Path(program).stem
        path = Path(folder) / f"faulty_{module}.py"
        path.write_text(f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                        f"import {module}\n{fault}\n{module}.main()\n")
        program = str(path)
    environment = os.environ | dict(OMP_NUM_THREADS="1") | popen.pop("env", {})
    return subprocess.Popen([*command, program, *arguments], cwd=ROOT, text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def finish(process, timeout=240):
    """-> exit status, stdout, stderr"""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for_step(process, out, step):
    """Until a line of the log has this step or a later one."""
    while not (Path(out) / "log.jsonl").is_file() or not any(
            line["step"] >= step for line in log_lines(out)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def answer(main, arguments, monkeypatch, capsys):
    """What a command line ends with: one sentence, and an exit status that is not 0."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        code = end.code
    else:
        code = 0
    sentence = f"{code if isinstance(code, str) else ''} {capsys.readouterr().err}"
    assert code not in (0, None), sentence
    assert "Traceback" not in sentence
    return sentence


def same_weights(one, two, parts=("model", "teacher")):
    """Whether two checkpoints have equal weights, and equal moments of the optimiser."""
    for part in parts:
        if not all(torch.equal(x, two[part][name]) for name, x in one[part].items()):
            return False
    moments = itertools.chain(*(state.items() for state in one["optimizer"]["state"].values()))
    others = itertools.chain(*(state.items() for state in two["optimizer"]["state"].values()))
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(moments, others, strict=True))
