"""What the code costs: each benchmark compares things in one run and prints ratios.

    python tools/bench.py                  # all, each in a process of its own
    python tools/bench.py steps memory     # some of them: BENCHES, at the end, names them
    python tools/bench.py gpu              # one GPU, nine minutes, a line of JSON for each figure

What is compared takes turns, so that a busy machine slows all alike.  A ratio is the median of the
rounds' ratios, with the least and the greatest; below 1 is faster.  open_clip has a row if it is
installed (tests/peers.txt).  Captions have the lengths of CC3M's, pictures the spectrum of photos.
`tokenizer` downloads CLIP's vocabulary, unless $CLIP_VOCAB names it.
"""
import argparse
import contextlib
import functools
import gc
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import losses
import model as models
import train
from support import shards, testsets
from support.runtime import Ranks
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
PEER = importlib.util.find_spec("open_clip") is not None


# ---------------------------------------------------------------- what all benchmarks share

class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make: `now` that live, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return result

    def gone(self, size):
        self.now -= size


def now():
    """Seconds, when the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(title, functions, rounds=10, warm=2):
    """Call each in turn; print its time, or the seconds that it returns, over the last one's."""
    seconds = {name: [] for name in functions}
    for number in range(warm + rounds):
        for name in reversed(functions) if number % 2 else functions:
            start = now()
            own = functions[name]()
            seconds[name].append(own if isinstance(own, float) else now() - start)
    *names, last = functions
    of_last = np.array(seconds[last][warm:])
    print(f"{title}: time over {last} ({np.median(of_last):.4f} s)")
    for name in names:
        low, middle, high = np.quantile(np.array(seconds[name][warm:]) / of_last, (0, 0.5, 1))
        print(f"  {name:<28} {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


def paper(method, what):
    """The paper's ratio to CLIP of "time" or "memory GB", in words, if it has one."""
    rows = testsets.prompts()["paper"]
    if method == "clip" or "cost" not in rows.get(method, {}):
        return ""
    return f" (paper {rows[method]['cost'][what] / rows['clip']['cost'][what]:.2f})"


def captions(n, seed=0):
    """n captions of CC3M's lengths: 10.3 words, deviation 4.5 (Sharma et al. 2018), Zipf's law."""
    rng = np.random.default_rng(seed)
    lengths = rng.gamma((10.3 / 4.5) ** 2, 4.5 ** 2 / 10.3, n).round().clip(1).astype(int)
    text = (ROOT / "support" / "prompts.json").read_text("utf-8")
    words = rng.permutation(sorted(set(re.findall("[A-Za-z]{2,}", text))))
    chances = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(words, lengths.sum(), p=chances / chances.sum())
    return list(map(" ".join, np.split(drawn, np.cumsum(lengths)[:-1])))


def photos(width, height, n=32):
    """n pictures with the 1/f spectrum of photographs.  -> JPEGs of quality 95, img2dataset's"""
    rng = np.random.default_rng(0)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    for _ in range(n):
        spectrum = rng.normal(size=(3, *f.shape)) + 1j * rng.normal(size=(3, *f.shape))
        grey, red, green = np.fft.irfft2(spectrum / f ** 1.6, (height, width))
        pixels = np.stack([grey, grey + 0.3 * red, grey + 0.3 * green], -1)
        pixels = 128 + 50 * pixels / pixels.std()
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        yield buffer.getvalue()


@contextlib.contextmanager
def pairs_folder(pictures, n):
    """A folder with a shard of n pairs, of these pictures in turn."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(Path(folder) / "00000.tar", "w") as tar:
            for i, caption in enumerate(captions(n)):
                shards.add_member(tar, f"{i:09d}.jpg", pictures[i % len(pictures)])
                shards.add_member(tar, f"{i:09d}.txt", caption.encode())
        yield folder


class PaddingTokenizer(Tokenizer):
    """Pads each text to the context length, as open_clip and SLIP do."""

    def __call__(self, texts, context_length=77):
        tokens = super().__call__(texts, context_length)
        return F.pad(tokens, (0, context_length - tokens.size(1)))


@functools.cache
def make_tokenizer(kind=Tokenizer):
    """A tokenizer of CLIP's size, learned from captions; the entries that are missing are idle."""
    learned = Tokenizer.train(captions(20_000, seed=1), 8192)
    idle = [(f"[{i}", "]") for i in range(models.ModelConfig.vocab_size - len(learned))]
    return kind([*learned.merges, *idle])


def open_loader(config, tokenizer, n_batches, workers=0):
    """The batches of a run with these settings, on the CPU."""
    pairs = data.Pairs(config.data)
    samples = data.Samples(pairs, tokenizer, models.METHODS[config.method].needs, config,
                           models.PRESETS[config.model])
    return data.make_loader(samples, pairs.sizes, config.seed, config.batch_size, 0, n_batches,
                            Ranks(0, 1, torch.device("cpu")), workers, samples.collate)


def bench_config(folder, method, batch_size, **given):
    """The settings of a run that neither logs nor saves in its first steps."""
    return train.make_config(dict(
        model="vit_b16", recipe="yfcc15m", data=[f"{folder}:999"], method=method, workers=0,
        batch_size=batch_size, log_every=10 ** 9) | given)


# ---------------------------------------------------------------- a step: train.train's own

def train_on(config, batches):
    """train.train with these batches in place of its loader's; the run ends where they end."""
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(StopIteration), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            mock.patch.object(data, "make_loader", lambda *_: batches), \
            mock.patch.object(train, "open_log", lambda *_: None), \
            mock.patch.object(train, "make_tokenizer", lambda *_: make_tokenizer()):
        train.train(replace(config, out=out))


def open_clip_on(config, batches):
    """open_clip 3.3's training of ViT-B-16, with its optimiser's settings, on these batches."""
    import open_clip
    model = open_clip.create_model("ViT-B-16", output_dict=True).to(DEVICE).train()
    compiled = torch.compile(model) if config.compile else model
    loss = open_clip.ClipLoss()
    groups = train.parameter_groups(model, 0.2)
    optimizer = torch.optim.AdamW(groups, 5e-4, (0.9, 0.98), 1e-6)
    for batch in batches:
        images = data.normalize(batch["images"].to(DEVICE))
        tokens = F.pad(batch["tokens"], (0, 77 - batch["tokens"].size(1))).to(DEVICE)
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            total = sum(loss(**compiled(images, tokens), output_dict=True).values())
        total.backward()
        optimizer.step()


def step_seconds(run, config, tokenizer, warm=2, n=3):
    """Seconds of a step: the median of n, after `warm` others, on the run's first batch."""
    gc.collect()
    if config.compile:
        torch.compiler.reset()  # it remembers the shapes of other runs, and gives up on new ones
    batch = next(iter(open_loader(config, tokenizer, 1)))
    times = []

    def batches():
        for _ in range(warm + n):
            times.append(now())
            yield dict(batch)
        times.append(now())
    run(config, batches())
    return float(np.median(np.diff(times)[warm:]))


def steps(rounds=5, **given):
    """A ViT-B/16 step of each method, and of open_clip (which always pads), over our CLIP's."""
    batch_size = 512 if CUDA else 8
    with pairs_folder(list(photos(340, 256)), 512) as folder:
        configs = {name: bench_config(folder, name, batch_size, **given) for name in models.METHODS}
        runs = {name + paper(name, "time"): (train_on, configs[name]) for name in models.METHODS}
        if PEER:
            runs["open_clip"] = (open_clip_on, configs["clip"])
        runs["clip"] = runs.pop("clip")  # the last one, over which the others are
        for captions, kind in (("short texts", Tokenizer), ("padded texts", PaddingTokenizer)):
            functions = {name: functools.partial(step_seconds, *run, make_tokenizer(kind))
                         for name, run in runs.items()}
            compare(f"step of ViT-B/16 {given or ''} {DEVICE_NAME}, batch {batch_size}, {captions}",
                    functions, rounds, warm=0)


def step_memory(config):
    """Count the bytes of the tensors that live in a run's second step, from their shapes alone.

    The attention is a GPU's.  What an allocator rounds up and the work space of libraries are not
    in it.  -> bytes that live before the step, peak
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    batch = next(iter(open_loader(config, make_tokenizer(), 1)))
    data.normalize(torch.zeros(1, 1, 3))  # which keeps the constants that it makes: real ones
    live, fake, result = Live(), FakeTensorMode(allow_non_fake_inputs=True), []
    fake.__deepcopy__ = lambda memo: fake  # the teacher's tensors are of the same mode

    def batches():
        no_numbers = {name: fake.from_tensor(x) for name, x in batch.items() if name != "bad"}
        yield no_numbers | dict(bad=[])
        gc.collect()
        live.peak = live.now
        result.append(live.now)
        yield no_numbers | dict(bad=[])
        result.append(live.peak)
    with mock.patch.object(torch.nn.Module, "to", lambda module, *_: module), \
            mock.patch.object(models, "attention", lambda q, k, v, mask=None, causal=False:
                              F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)), \
            mock.patch.object(train, "split", lambda whole, _: [whole]), live, fake:
        train_on(replace(config, precision="bf16"), batches())
    return result


def memory(batch_size=256):
    """Peak memory of a ViT-B/16 step of each method, over CLIP's."""
    print(f"memory of a step of ViT-B/16, bf16, batch {batch_size}, counted: peak over CLIP's")
    with pairs_folder(list(photos(340, 256)), batch_size) as folder:
        configs = {name: bench_config(folder, name, batch_size) for name in models.METHODS}
        _, of_clip = step_memory(configs["clip"])
        for name, config in configs.items():
            before, peak = step_memory(config)
            print(f"  {name + paper(name, 'memory GB'):<24} {peak / of_clip:.2f}: "
                  f"{peak / 2 ** 30:.2f} GiB, {before / 2 ** 30:.2f} before the step", flush=True)


def scaling(batch_size=512, width=512):
    """Memory of a rank's contrastive loss as ranks grow; the other ranks' rows are simulated."""
    print(f"contrastive loss, {batch_size} pairs a rank: peak of a rank, counted")
    for world_size in (1, 2, 4, 8):
        image, text = (torch.randn(batch_size, width, requires_grad=True) for _ in range(2))
        others = torch.randn((world_size - 1) * batch_size, width)
        with mock.patch.object(losses, "gather", lambda x, others=others: torch.cat([x, others])), \
                Live() as live:
            sum(losses.contrastive_loss(image, text, torch.tensor(14.3))).backward()
        print(f"  {world_size} ranks {live.peak / 2 ** 20:6.0f} MiB")


# ---------------------------------------------------------------- data, start

def loader(n=1536):
    """One loader process, over one process in which Pillow decodes, crops and resizes."""
    torch.set_num_threads(1)

    def pillow(files):
        rng = np.random.default_rng(0)
        for i in range(n):
            image = Image.open(io.BytesIO(files[i % len(files)])).convert("RGB")
            x, y, w, h = data.crop_box(*image.size, (0.5, 1.0), rng)
            np.asarray(image.resize((224, 224), Image.BILINEAR, (x, y, x + w, y + h)))

    def load(config):
        n_batches = 1 + n // config.batch_size  # the first one waits for the process to start
        batches = iter(open_loader(config, make_tokenizer(), n_batches, workers=1))
        next(batches)
        began = now()
        for _ in batches:
            pass
        return now() - began

    for width, height in ((340, 256), (680, 512), (1360, 1024)):
        files = list(photos(width, height))
        with pairs_folder(files, n) as folder:
            functions = {name: functools.partial(load, bench_config(folder, name, 256))
                         for name in ("clip", "maskclip", "slip")}
            compare(f"{n} JPEGs of {width} x {height}",
                    functions | dict(Pillow=functools.partial(pillow, files)), rounds=3, warm=1)


def words(n=20_000):
    """CLIP's tokenizer on one core: words that it has seen, and open_clip's, over new words."""
    texts, tokenizer = captions(n), Tokenizer.clip()

    def new_words():
        tokenizer.cache.clear()
        tokenizer(texts)
    functions = {"seen words": lambda: tokenizer(texts)}
    if PEER:
        import open_clip
        functions["open_clip"] = functools.partial(open_clip.get_tokenizer("ViT-B-16"), texts)
    compare(f"tokenizer, {n:,} captions, one core", functions | {"new words": new_words}, rounds=5)


def start():
    """The demo's first step from the command on, over importing torch."""
    def python(*arguments):
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        compare("start", {
            "import train": lambda: python("-c", "import train"),
            "one step of the demo": lambda: python("train.py", "--steps", "1", "--root", folder,
                                                   "--out", tempfile.mkdtemp(dir=folder)),
            "import torch": lambda: python("-c", "import torch")}, rounds=3)


# ---------------------------------------------------------------- one GPU, in nine minutes

def gflop_of_a_pair(config):
    """The arithmetic of a training step, counted, for each of its pairs."""
    batch = next(iter(open_loader(config, make_tokenizer(), 1)))
    with FlopCounterMode(display=False) as counter:
        train_on(config, iter([batch]))
    return counter.get_total_flops() / config.batch_size / 1e9


def product_rate(side, n=10):
    """TFLOP/s of bf16 products of square matrices."""
    x = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    x @ x
    start = now()
    for _ in range(n):
        x @ x
    return 2 * n * side ** 3 / (now() - start) / 1e12


def largest_step(run, config, sizes):
    """Seconds of a step and its peak memory at the largest batch that fits.  -> dict"""
    for size in sizes:
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = step_seconds(run, replace(config, batch_size=size), make_tokenizer())
        except torch.OutOfMemoryError:
            continue
        gib = torch.cuda.max_memory_allocated() / 2 ** 30 if CUDA else 0.0
        return dict(batch=size, pictures_per_s=round(size / seconds, 1), gib=round(gib, 2))
    return dict(batch=0, pictures_per_s=0.0, gib=0.0)


def waits(config):
    """How often the CPU waits for the GPU in two steps between two lines of the log."""
    set_mode = torch.cuda.set_sync_debug_mode if CUDA else lambda mode: None
    batch = next(iter(open_loader(config, make_tokenizer(), 1)))

    def batches():
        for number in range(4):
            set_mode("warn" if number > 1 else "default")
            yield dict(batch)
        set_mode("default")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_on(config, batches())
    return sum("synchronizing CUDA" in str(warning.message) for warning in caught)


def demo_losses(folder, precision, n):
    """The contrastive loss of each step of a demo run."""
    out = Path(folder, precision)
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(train.make_config(dict(root=folder, out=str(out), steps=n, log_every=1,
                                           precision=precision)))
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return np.array([line["image"] + line["text"] for line in lines])


def gpu():
    """All that is to be measured on a GPU, in nine minutes; a line of JSON for each figure.

    Without one: the same with a small model, to rehearse it.
    """
    began = time.perf_counter()
    model, sizes, side, n_demo = "vit_b16", (1024, 512, 256), 8192, 300
    if not CUDA:
        model, sizes, side, n_demo = "tiny", (16, 8), 512, 10
    rows = []

    def tell(figure, **values):
        rows.append((figure, values))
        print(json.dumps(dict(figure=figure, device=DEVICE_NAME, model=model, **values,
                              seconds=round(time.perf_counter() - began))), flush=True)

    rate = product_rate(side)
    tell("bf16 product", side=side, tflops=round(rate, 1))
    kind = "bf16" if CUDA else "fp32"
    with pairs_folder(list(photos(340, 256)), sizes[0]) as folder:
        configs = {name: bench_config(folder, name, sizes[-1], model=model, precision=kind)
                   for name in models.METHODS}
        of_clip = None
        for name in ("clip", *(name for name in models.METHODS if name != "clip")):
            values = largest_step(train_on, configs[name], sizes)
            of_clip = of_clip or values
            work = gflop_of_a_pair(replace(configs[name], batch_size=8))
            speed = values["pictures_per_s"]
            tell(name, **values, gflop_a_pair=round(work, 1),
                 share_of_product=round(work * speed / 1e3 / rate, 3),
                 time_over_clip=round(of_clip["pictures_per_s"] / max(speed, 1e-9), 2),
                 memory_over_clip=round(values["gib"] / max(of_clip["gib"], 1e-9), 2))
        if PEER:
            tell("open_clip's clip", **largest_step(open_clip_on, configs["clip"], sizes))
        for name in ("clip", "maskclip"):
            compiled = replace(configs[name], compile=True)
            tell(f"{name}, compiled", **largest_step(train_on, compiled, sizes))
        for n_parts in (2, 8):
            config = replace(configs["maskclip"], micro_batch=sizes[1] // n_parts)
            tell(f"maskclip, {n_parts} parts", **largest_step(train_on, config, sizes[1:2]))
        counts = {name: waits(config) for name, config in configs.items()}
        tell("waits for the GPU in two steps", **counts)
        network = models.build(replace(models.PRESETS[model], method="clip")).eval()
        pictures = torch.randint(256, (64, *[network.config.image_size] * 2, 3), dtype=torch.uint8)
        with torch.no_grad():
            here = network.encode_image(data.normalize(pictures))
            there = network.to(DEVICE).encode_image(data.normalize(pictures.to(DEVICE))).cpu()
        tell("evaluation, CPU and GPU", largest_difference=float((here - there).abs().max()))
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: demo_losses(folder, name, n_demo) for name in ("fp32", "bf16")}
    ends = {name: float(curve[-n_demo // 10:].mean()) for name, curve in curves.items()}
    gap = float(np.abs(curves["bf16"] - curves["fp32"]).mean())
    tell("demo, contrastive loss", steps=n_demo, **ends, mean_gap=round(gap, 4))
    print("\n| | figures |\n|---|---|")
    for figure, values in rows:
        print(f"| {figure} | {', '.join(f'{name} {x}' for name, x in values.items())} |")


BENCHES = dict(steps=steps, compiled=functools.partial(steps, compile=True), memory=memory,
               scaling=scaling, data=loader, tokenizer=words, start=start, gpu=gpu)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *BENCHES], help="none: all")
    names = parser.parse_args().names or [name for name in BENCHES if name != "gpu"]
    if len(names) == 1:
        BENCHES[names[0]]()
        return
    for name in names:  # each in a process of its own, whose threads and memory are its own
        subprocess.run([sys.executable, __file__, name], check=False)


if __name__ == "__main__":
    main()
