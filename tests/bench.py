"""Benchmarks: each compares things in one run and prints ratios.

Without open_clip and network `tokenizer` and `head` need $CLIP_VOCAB.  tests/test_train.py takes Live from here.

    python tests/bench.py                                               all
    python tests/bench.py [steps|parts|memory|scaling|data|tokenizer|head|start|evaluation] ...
    python tests/bench.py tokenizer --data yfcc15m --root /where/data/lies    on its captions instead of drawn ones

Where open_clip is installed (tests/peers.txt, .ci/run) it has a row of its own.
"""
import argparse
import contextlib
import functools
import gc
import importlib.util
import io
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import evaluate
import losses
import model as models
import tokenizer
import train

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEER = importlib.util.find_spec("open_clip") is not None
COSTS = {method: scores["cost"] for method, scores in data.prompts()["paper"].items() if "cost" in scores}
PAPER = {method: (cost["time"], cost["memory GB"] / COSTS["clip"]["memory GB"])  # time, memory over CLIP's
         for method, cost in COSTS.items() if method != "clip"}


def captions(n, seed=0):
    """Captions of CC3M's lengths (10.3 words, deviation 4.5; Sharma et al. 2018); words of prompts.json, Zipf."""
    rng = np.random.default_rng(seed)
    lengths = rng.gamma((10.3 / 4.5) ** 2, 4.5 ** 2 / 10.3, n).round().clip(1).astype(int)
    words = rng.permutation(sorted(set(re.findall("[A-Za-z]{2,}", (ROOT / "prompts.json").read_text()))))
    chances = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(words, lengths.sum(), p=chances / chances.sum()).tolist()
    ends = np.cumsum(lengths).tolist()
    return [" ".join(drawn[start:end]) for start, end in zip([0, *ends], ends)]


def jpeg(width, height, rng, quality=95):
    """A picture with the 1/f spectrum of photographs.  -> JPEG bytes (of quality 95, img2dataset's)"""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    spectrum = rng.normal(size=(3, *f.shape)) + 1j * rng.normal(size=(3, *f.shape))
    grey, *colour = np.fft.irfft2(spectrum / f ** 1.6, (height, width))
    pixels = np.stack([grey, grey + 0.3 * colour[0], grey + 0.3 * colour[1]], -1)
    pixels = 128 + 50 * pixels / pixels.std()
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def shards(folder, pictures, copies, shard_size=1000):
    """Write each picture `copies` times, with captions.  -> folder"""
    rng, texts = np.random.default_rng(0), captions(len(pictures) * copies)
    order = rng.permutation(len(pictures) * copies)
    for number in range(0, len(order), shard_size):
        with tarfile.open(folder / f"{number // shard_size:05d}.tar", "w") as tar:
            for i in order[number:number + shard_size]:
                data.add_member(tar, f"{i:09d}.jpg", pictures[i % len(pictures)])
                data.add_member(tar, f"{i:09d}.txt", texts[i].encode())
    return folder


def timed(functions, rounds=10, warm=2):
    """Run each in turn, `rounds` times after `warm` ones.  -> {name: median seconds}"""
    seconds = {name: [] for name in functions}
    for number in range(warm + rounds):
        for name, function in functions.items():
            if DEVICE.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end) / 1000
            else:
                start = time.perf_counter()
                function()
                taken = time.perf_counter() - start
            if number >= warm:
                seconds[name].append(taken)
    return {name: float(np.median(x)) for name, x in seconds.items()}


# ---------------------------------------------------------------- the step

@functools.cache
def filled_tokenizer():
    """A tokenizer with as many entries as CLIP's; those that were not learned from captions occur nowhere."""
    learned = tokenizer.Tokenizer.train(captions(20_000, seed=1), 8192).merges
    return tokenizer.Tokenizer([*learned, *((f"[{i}", "]") for i in range(49409 - tokenizer.FIXED - len(learned)))])


@contextlib.contextmanager
def pairs_folder(n):
    """n pairs in shards; ViT-B/16 batches of any method are made of them."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        yield shards(Path(folder), [jpeg(340, 256, rng) for _ in range(min(n, 32))], -(-n // 32))


def opened(folder, method, batch_size, mode=None, **given):
    """train.py's run of ViT-B/16 on the device, its tensors made under `mode`, and its first batch."""
    config = train.resolve(dict(data=[str(folder)], model="vit_b16", method=method, batch_size=batch_size, epochs=1000,
                                micro_batch=batch_size, workers=0, out=str(folder / "run"), **given))
    place, tok = train.join(10), filled_tokenizer()
    with contextlib.redirect_stdout(io.StringIO()):
        pairs = train.open_pairs(config, place)
        known = dict(open_pairs=lambda *_: pairs, make_tokenizer=lambda *_: tok)
        with mode or contextlib.nullcontext(), mock.patch.multiple(train, **known):
            run = train.open_run(config, place)
    batch = next(iter(train.open_loader(run, run.total)))
    del batch["bad"]
    return run, {name: x.pin_memory() if DEVICE.type == "cuda" else x for name, x in batch.items()}


def stepper(run, batch):
    """One step of the training loop as a function without arguments."""
    step, count, _ = train.make_step(run, iter(()))
    return lambda: train.advance(run, step, step.sent(train.split(batch, count)))


def padded(batch, length=77):
    """The batch with its captions padded, as open_clip and SLIP do it."""
    old = batch["tokens"].size(1)
    longer = {name: F.pad(batch[name], (0, length - old)) for name in ("tokens", "mlm_tokens") if name in batch}
    if "mlm_ids" in batch:
        longer["mlm_ids"] = batch["mlm_ids"] // old * length + batch["mlm_ids"] % old
    return batch | {name: x.pin_memory() if DEVICE.type == "cuda" else x for name, x in longer.items()}


def open_clip_stepper(batch, amp, compiled):
    """One step of open_clip 3.3's training loop on the same batch, ViT-B-16, with its optimiser's settings."""
    import open_clip
    model = open_clip.create_model("ViT-B-16", output_dict=True).to(DEVICE).train()
    loss, run = open_clip.ClipLoss(), torch.compile(model) if compiled else model
    no_decay = [p for name, p in model.named_parameters() if p.ndim < 2 or any(x in name for x in ("bn", "ln", "bias"))]
    others = {id(p) for p in no_decay}
    optimizer = torch.optim.AdamW([dict(params=no_decay, weight_decay=0.0), dict(params=[
        p for p in model.parameters() if id(p) not in others], weight_decay=0.2)], 5e-4, (0.9, 0.98), 1e-6)
    images = data.normalize(batch["images"]).contiguous()
    images, tokens = (x.pin_memory() if DEVICE.type == "cuda" else x for x in (
        images, F.pad(batch["tokens"], (0, 77 - batch["tokens"].size(1)))))

    def step():
        on_device = images.to(DEVICE, non_blocking=True), tokens.to(DEVICE, non_blocking=True)
        optimizer.zero_grad()
        with amp:
            total = sum(loss(**run(*on_device), output_dict=True).values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
    return step


def product_rate(size, dtype):
    """FLOP a second of one matrix product of that size."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / timed(dict(product=lambda: a @ b))["product"]


def flops(step):
    """Counted floating-point operations of one call, forward and backward; on the CPU without the attention's own."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def steps():
    """ViT-B/16 training steps of all methods, with captions as long as they are and padded to 77, and open_clip's."""
    cuda = DEVICE.type == "cuda"
    rate = product_rate(8192 if cuda else 2048, torch.bfloat16 if cuda else torch.float32)
    for compiled, batch_size, methods in ((False, 512 if cuda else 8, ("clip", "clip_mae", "maskclip", "slip")),
                                          (True, 1024 if cuda else 8, ("clip", "maskclip"))):
        with pairs_folder(batch_size) as folder:
            functions = {}
            for method in methods:
                run, batch = opened(folder, method, batch_size, compile=compiled)
                functions[method], functions[f"{method}, 77"] = stepper(run, batch), stepper(run, padded(batch))
                if method == "clip" and PEER:
                    functions["open_clip, 77"] = open_clip_stepper(batch, run.amp, compiled)
            seconds = timed(functions)
            print(f"steps of ViT-B/16 on {name_of_device()}, {'bf16' if cuda else 'fp32'}, batch {batch_size}, "
                  f"{'compiled' if compiled else 'eager'}, captions of at most {batch['tokens'].size(1)} tokens, or 77")
            for name, x in seconds.items():
                method, _, length = name.partition(", ")
                line = f"  {name:<14} {batch_size / x:8.2f} pictures/s; time over "
                if method != "open_clip":
                    line += f"clip's of that length {x / seconds[name.replace(method, 'clip')]:.2f}"
                    line += f" (paper {PAPER[method][0]:.2f})" if method in PAPER and length else ""
                    line += f", over open_clip's {x / seconds['open_clip, 77']:.2f}" if PEER else ""
                    line += f"; {flops(functions[name]) / x / rate:.0%} of a matrix product's FLOP/s"
                else:
                    line += f"clip's {x / seconds['clip']:.2f}, of that length {x / seconds['clip, 77']:.2f}"
                print(line, flush=True)
            functions = run = None
            gc.collect()


def name_of_device():
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def parts():
    """What single changes to the step are worth: each as it is, over what stood there before or might stand there."""
    train.keep_memory()
    size = 256 if DEVICE.type == "cuda" else 8
    amp = torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")
    config = replace(models.PRESETS["vit_b16"], method="maskclip")
    model = models.build(config).to(DEVICE)
    teacher, block = models.Teacher(model), models.Block(768, 12, 1e-6).to(DEVICE)
    images = torch.randn(size, 3, 224, 224, device=DEVICE)
    x = torch.randn(size, 197, 768, device=DEVICE, requires_grad=True)
    kind = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    student = torch.randn(size * 147, config.codewords, device=DEVICE, dtype=kind, requires_grad=True)
    target, center = torch.randn_like(student), torch.zeros(config.codewords, device=DEVICE)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    fused, foreach = (torch.optim.AdamW(model.parameters(), 1e-4, **{how: True}) for how in ("fused", "foreach"))

    def backward(function, amp=amp):
        def both():
            x.grad = student.grad = None
            with amp:
                y = function()
            y.float().mean().backward()
        return both

    def one_by_one():
        with torch.no_grad():
            for a, b in zip(teacher.visual.parameters(), model.visual.parameters()):
                a.mul_(0.999).add_(b, alpha=0.001)

    class ByRows(torch.autograd.Function):
        """The distillation loss, its gradient made in the forward pass by some rows at a time: no (R, K) in float32."""

        @staticmethod
        def forward(ctx, s, t):
            ctx.gradient, rows = torch.empty_like(s), []
            few = max(1, (2 ** 24 if s.is_cuda else 2 ** 18) // s.size(1))
            for some, of_teacher, gradient in zip(s.split(few), t.split(few), ctx.gradient.split(few)):
                p, log_q = ((of_teacher.float() - center) / 0.04).softmax(-1), (some.float() / 0.1).log_softmax(-1)
                rows.append(-torch.linalg.vecdot(p, log_q))
                gradient.copy_((log_q.exp_() - p) / 0.1)
            return torch.cat(rows)

        @staticmethod
        def backward(ctx, of_rows):
            return torch.mul(ctx.gradient, of_rows[:, None], out=ctx.gradient), None

    def product():
        p = images.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        embed = model.visual.patch_embed.proj
        return F.linear(p, embed.weight.flatten(1), embed.bias)

    def attended(function, length):
        q = torch.randn(size, 12, length, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        return lambda: torch.autograd.grad(function(q, q, q).sum(), q)

    def full_image(mode):
        with mode, amp:
            teacher.visual(images)
    compared = {
        "last block for the class token alone, over all tokens": (
            backward(lambda: block(x, rows=slice(1))), backward(lambda: block(x)[:, :1])),
        "distillation loss by autograd, over its gradient made by rows": (
            backward(lambda: losses.distillation_loss(student, target, center), contextlib.nullcontext()),
            backward(lambda: ByRows.apply(student, target), contextlib.nullcontext())),
        "patch embedding as a convolution, over a matrix product": (
            backward(lambda: model.visual.patch_embed(images)), backward(product)),
        "teacher without gradient, over inference mode": (
            lambda: full_image(torch.no_grad()), lambda: full_image(torch.inference_mode())),
        "attention to 197 tokens in bf16, over PyTorch's": (
            attended(models.attention, 197), attended(F.scaled_dot_product_attention, 197)),
        "EMA by foreach, over one by one": (lambda: models.ema_update(teacher, model, 0.999), one_by_one),
        "AdamW fused, over foreach": (fused.step, foreach.step),
    }
    print(f"parts of a step of ViT-B/16 on {name_of_device()}, batch {size}, time")
    for name, (ours, other) in compared.items():
        seconds = timed(dict(ours=ours, other=other))
        print(f"  {name}: {seconds['ours'] / seconds['other']:.2f} ({1000 * seconds['ours']:.1f} ms, "
              f"{1000 * seconds['other']:.1f} ms)", flush=True)


class Live(TorchDispatchMode):
    """The bytes of all tensors that operations made and that still live; `peak` is the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
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


def step_memory(method, batch_size, folder):
    """-> peak bytes of a step after the first, bytes that stand before it: weights, gradients, moments, teacher

    On CUDA they are measured.  Elsewhere the step runs with tensors that have shapes and types but no numbers, under
    the CPU's bf16 autocast, and the bytes of those that live are counted: what a caching allocator rounds up, and the
    work space of its libraries, are not in it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    if DEVICE.type == "cuda":
        run, batch = opened(folder, method, batch_size)
        step = stepper(run, batch)
        step()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        lasting = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated(), lasting
    live, fake = Live(), FakeTensorMode()
    fake.__deepcopy__ = lambda memo: fake  # the teacher's tensors are of this mode too

    @contextlib.contextmanager
    def counting():
        data._channels.cache_clear()  # a real tensor among the others
        with live, fake, mock.patch.object(torch.nn.Module, "to", lambda module, *_: module), mock.patch.object(
                models, "attention", lambda q, k, v, mask, causal: F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal)):  # a GPU's
            yield
        data._channels.cache_clear()
    run, batch = opened(folder, method, batch_size, mode=counting(), precision="bf16")
    with counting():
        step = stepper(run, {name: fake.from_tensor(x) for name, x in batch.items()})
        step()
        gc.collect()
        lasting = live.peak = live.now
        step()
    return live.peak, lasting


def memory():
    """Peak memory of a ViT-B/16 step of each method, over CLIP's."""
    batch_size = 512 if DEVICE.type == "cuda" else 256
    how = "measured" if DEVICE.type == "cuda" else "counted from shapes, not measured"
    print(f"memory of a step of ViT-B/16, bf16, eager, batch {batch_size} ({how})")
    with pairs_folder(batch_size) as folder:
        peaks = {}
        for method in ("clip", "clip_mae", "maskclip", "slip"):
            peaks[method], lasting = step_memory(method, batch_size, folder)
            gc.collect()
            print(f"  {method:<10} {peaks[method] / 2 ** 30:7.2f} GiB, {lasting / 2 ** 30:.2f} of it lasting; "
                  f"{peaks[method] / peaks['clip']:.2f} of clip's" + (f" (paper {PAPER[method][1]:.2f})" if method in
                                                                      PAPER else ""), flush=True)


def scaling(batch_size=512, width=512):
    """Memory of a rank's contrastive loss, forward and back, as ranks grow: the gathered rows are simulated."""
    def everyone(one, world):
        return torch.cat([one, *(torch.randn_like(one) for _ in range(world - 1))])

    def ours(image, text, world):
        with mock.patch.object(losses, "gather", lambda x: everyone(x, world)):
            return sum(losses.contrastive_loss(image, text, torch.tensor(14.3)))

    def everything(image, text, world):
        """(W * B, W * B) logits on each rank, as open_clip's ClipLoss without --local-loss."""
        image, text = (everyone(F.normalize(x, dim=1), world) for x in (image, text))
        logits, target = 14.3 * image @ text.T, torch.arange(len(image))
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    print(f"contrastive loss of a rank with {batch_size} pairs, forward and back, MiB at most")
    for loss in (ours, everything):
        row = []
        for world in (1, 2, 4, 8):
            image, text = (torch.randn(batch_size, width, requires_grad=True) for _ in range(2))
            with Live() as live:
                loss(image, text, world).backward()
            row.append(live.peak / 2 ** 20)
        print(f"  {loss.__name__:<12}" + ", ".join(f"{w} ranks {x:.0f}" for w, x in zip((1, 2, 4, 8), row))
              + f": from 4 to 8 ranks {row[3] / row[2]:.2f} times")


def start():
    """From the command to the first step of the demo, its world drawn before; the time to import each file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--steps", "1", "--root", folder]
        quiet = dict(stderr=subprocess.DEVNULL, text=True)  # no terminal: lines instead of a bar
        subprocess.run([*command, "--out", f"{folder}/first"], check=True, stdout=subprocess.DEVNULL, **quiet)
        seconds = []
        for number in range(3):
            begin = time.perf_counter()
            with subprocess.Popen([*command, "--out", f"{folder}/{number}"], stdout=subprocess.PIPE, **quiet) as run:
                next(line for line in run.stdout if line.startswith("step 1/"))
                seconds.append(time.perf_counter() - begin)
                run.communicate()
    print(f"first step of the demo after {np.median(seconds):.1f} s")
    code = "import time, torch; a = time.perf_counter(); import {}; print(time.perf_counter() - a)"
    for name in ("tokenizer", "data", "model", "losses", "train", "evaluate"):
        seconds = [float(subprocess.run([sys.executable, "-c", code.format(name)], cwd=ROOT, check=True,
                                        capture_output=True, text=True).stdout) for _ in range(5)]
        print(f"  import {name:<10} {np.median(seconds):.3f} s beyond torch")


def words(texts=None):
    """Captions a second of CLIP's tokenizer on one core: a new one, and one that knows the words; and open_clip's."""
    torch.set_num_threads(1)
    texts, tok = texts or captions(40_000), tokenizer.Tokenizer.clip()
    few, rates = texts[:4000], []

    def rate(encode, texts):
        begin = time.perf_counter()
        for i in range(0, len(texts), 256):
            encode(texts[i:i + 256])
        return len(texts) / (time.perf_counter() - begin)
    if PEER:
        import open_clip
        peer = open_clip.get_tokenizer("ViT-B-16")
    for _ in range(5):
        tok.cache.clear()
        rates.append([rate(tok, texts), rate(tok, texts), rate(peer, few) if PEER else np.nan])
    new, known, theirs = np.median(rates, 0)
    print(f"tokenizer, {len(texts):,} captions on one core, captions/s: {new:,.0f}, once it knows their words "
          f"{known:,.0f}" + (f"; open_clip {theirs:,.0f}: {new / theirs:.1f} and {known / theirs:.1f} times that"
                             if PEER else "; open_clip not installed"))


# ---------------------------------------------------------------- data and evaluation

def rate_of(batches, skip, size):
    """Samples a second of an iterator of batches, the first `skip` left out."""
    iterator = iter(batches)
    for _ in range(skip):
        next(iterator)
    start, n = time.perf_counter(), 0
    for _ in iterator:
        n += size
    return n / (time.perf_counter() - start)


def pillow_rate(pictures, n):
    """Pictures a second of one process that only decodes and resizes."""
    start, rng = time.perf_counter(), np.random.default_rng(0)
    for i in range(n):
        image = Image.open(io.BytesIO(pictures[i % len(pictures)])).convert("RGB")
        np.asarray(image.resize((224, 224), Image.BILINEAR, data_box(image, rng)))
    return n / (time.perf_counter() - start)


def data_box(image, rng):
    x, y, w, h = data.crop_box(*image.size, (0.5, 1.0), rng)
    return x, y, x + w, y + h


def our_loader(folder, needs, batch_size=256, workers=1, seed=0, root="."):
    pairs = data.Pairs([str(folder)], root)
    config = SimpleNamespace(seed=seed, crop_min=0.5, mask="block", mask_ratio=0.75, mlm_ratio=0.2, compile=False)
    shape = SimpleNamespace(image_size=224, grid=14, context_length=77)
    samples = data.Samples(pairs, filled_tokenizer(), needs, config, shape)
    batches = data.GlobalBatches(data.Order(pairs.sizes, seed), batch_size, 0, len(pairs) // batch_size)
    return torch.utils.data.DataLoader(samples, batch_sampler=batches, collate_fn=samples.collate, num_workers=workers)


def open_clip_loader(folder, batch_size=256):
    """open_clip's training chain: webdataset with its shuffles, torchvision's transforms, CLIP's tokenizer."""
    import open_clip
    import webdataset as wds
    from open_clip.transform import image_transform
    preprocess, tokenize = image_transform(224, is_train=True), open_clip.get_tokenizer("ViT-B-16")
    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = wds.DataPipeline(
        wds.SimpleShardList(urls), wds.split_by_worker, wds.tarfile_to_samples(),
        wds.shuffle(bufsize=1000, initial=500), wds.select(lambda sample: "txt" in sample and "jpg" in sample),
        wds.decode("pilrgb", handler=wds.ignore_and_continue), wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=preprocess, text=lambda text: tokenize(text)[0]), wds.to_tuple("image", "text"),
        wds.batched(batch_size, partial=False))
    return wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=1)


def loader():
    """One worker against Pillow alone and against open_clip's chain, in turn, three times."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for width, height, n in ((340, 256, 4096), (680, 512, 2048), (1360, 1024, 1536)):
        pictures = [jpeg(width, height, rng) for _ in range(32)]
        with tempfile.TemporaryDirectory() as folder:
            shards(Path(folder), pictures, n // 32)
            rates = []
            for _ in range(3):
                row = [pillow_rate(pictures, n // 4)]
                row += [rate_of(our_loader(folder, needs), 2, 256) for needs in (
                    ("images", "text"), ("images", "text", "mask", "mlm"))]
                if importlib.util.find_spec("open_clip"):
                    row.append(rate_of(open_clip_loader(Path(folder)), 2, 256))
                rates.append(row)
            row = np.median(rates, 0)
            peer = (f"; open_clip {row[3]:.0f}, CLIP's is {row[1] / row[3]:.2f} times that" if len(row) > 3 else
                    "; open_clip not installed")
            print(f"loader {width} x {height}, {np.mean([len(p) for p in pictures]) / 1000:.0f} KB, pictures/s, one "
                  f"worker: Pillow alone {row[0]:.0f}; CLIP's batches {row[1]:.0f} ({row[1] / row[0]:.2f}), MaskCLIP's "
                  f"{row[2]:.0f} ({row[2] / row[0]:.2f}){peer}", flush=True)


def resident():
    """MiB of memory that this process holds, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 20


def index(pairs=15_000_000, shard_size=10_000):
    """A known collection of 15 million pairs: opening, the epoch's order, finding a pair; the index is synthetic."""
    n = pairs // shard_size
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{i:05d}.tar" for i in range(n)]
        for name in names:
            (Path(folder) / name).touch()
        source = data.Shards.__new__(data.Shards)
        data.Source.__init__(source, Path(folder) / "pairs", folder)
        rows = np.zeros(shard_size, data.ROW)
        rows["image"] = 1024 + np.arange(shard_size) * 32768
        rows["text"], rows["image_size"], rows["text_size"] = rows["image"] + 31744, 30000, 60
        chunks = [rows.copy() for _ in names]
        for number, chunk in enumerate(chunks):
            chunk["file"] = number
        source.save({name: source.stamp(name) for name in names}, [shard_size] * n, chunks, damage={})
        size = (Path(folder) / "pairs.index").stat().st_size
        del source, chunks
        before, start = resident(), time.perf_counter()
        opened = data.Pairs([folder])
        seconds = time.perf_counter() - start
        assert len(opened) == pairs
        start = time.perf_counter()
        data.Order(opened.sizes, 0)(3, pairs // 2, pairs // 2 + 4096)
        first = time.perf_counter() - start
        order = data.Order(opened.sizes, 0)(0, 0, 100_000).tolist()
        places = np.random.default_rng(0).integers(pairs, size=100_000).tolist()
        near, far = (find_time(opened, keys) for keys in (order, places))
        print(f"index of {pairs:,} pairs in {n:,} shards: {size / 2 ** 20:.0f} MiB on disk; opened in {seconds:.2f} s; "
              f"first batch in mid-epoch after {first:.3f} s; finding a pair {1e6 * near:.1f} us in the order, "
              f"{1e6 * far:.1f} us anywhere; memory grew by {resident() - before:.0f} MiB, the index with it")


def find_time(pairs, keys):
    start = time.perf_counter()
    for key in keys:
        source, row = pairs.find(0, key)
        source.rows[row].item()
    return (time.perf_counter() - start) / len(keys)


def order(shards=500_000):
    """The order of 5 billion pairs in 500,000 shards: memory and the first batch at any place."""
    sizes = np.random.default_rng(0).integers(9_000, 11_001, shards)
    start, before = time.perf_counter(), resident()
    order, seconds = data.Order(sizes, 0), []
    for place in np.random.default_rng(1).integers(order.n - 4096, size=10).tolist():
        start = time.perf_counter()
        assert len(np.unique(order(place % 7, place, place + 4096))) == 4096
        seconds.append(time.perf_counter() - start)
    print(f"order of {order.n:,} pairs in {shards:,} shards: first batch anywhere after {max(seconds):.2f} s; "
          f"memory grew by {resident() - before:.0f} MiB, to {resident():.0f} with Python and torch")


def worker(n=20_000):
    """What a worker process holds after 2,000 and after 20,000 samples of MaskCLIP's batches."""
    train.keep_memory()  # as a training run, whose workers have it too
    rng = np.random.default_rng(0)
    pictures = [jpeg(int(side), 256, rng) for side in rng.integers(200, 400, 16)]
    with tempfile.TemporaryDirectory() as folder:
        loader = our_loader(shards(Path(folder), pictures, n // 16), ("images", "text", "mask", "mlm"))
        collate, held = loader.collate_fn, []
        loader.collate_fn = lambda samples: dict(collate(samples), held=resident())
        for batch in loader:
            held.append(batch["held"])
    a, b = held[2000 // 256], held[-1]
    print(f"memory of a worker: {a:.1f} MiB after 2,000 samples, {b:.1f} after {256 * len(held):,} ({b / a - 1:+.2%})")


def head(few=400, many=4000):
    """ImageNet's prompts through ViT-B/16's text tower: batches of like length against each prompt padded to 77."""
    facts, tok = data.protocols()["imagenet"], tokenizer.Tokenizer.clip()
    model = models.build(replace(models.PRESETS["vit_b16"], method="clip")).eval()
    prompts = [template.replace("{}", name) for name in facts["classes"] for template in facts["templates"]]
    prompts = np.random.default_rng(0).permutation(prompts)[:many].tolist()

    def padded(batch_size=100):
        rows = [torch.nn.functional.pad(rows, (0, 77 - rows.size(1))) for rows in map(tok, prompts[:few])]
        with torch.no_grad():
            parts = [model.encode_text(torch.cat(part)) for part in
                     (rows[i:i + batch_size] for i in range(0, few, batch_size))]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        ours = evaluate.encode_texts(model, tok, prompts)
        middle = time.perf_counter()
        theirs = padded()
        end = time.perf_counter()
        ratios.append(((middle - start) / many) / ((end - middle) / few))
    difference = (ours[:few] - theirs).abs().max()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "last.pt")
        start = time.perf_counter()
        cache = evaluate.Cache(Path(folder) / "last.pt")
        cache("classifier", (facts["classes"], facts["templates"]), lambda: torch.zeros(1000, 512))
        again = cache("classifier", (facts["classes"], facts["templates"]), lambda: torch.ones(1000, 512))
        assert again.sum() == 0
        seconds = time.perf_counter() - start
    print(f"ImageNet's classifier, ViT-B/16: a prompt takes {np.median(ratios):.3f} of the time of one padded to 77, "
          f"features within {difference:.0e}; the cache, with the hash of the weights, takes {seconds:.2f} s")


def pictures(n=4000):
    """Evaluation with a model that costs nothing against its loader alone, and against Pillow alone in one process."""
    model = SimpleNamespace(config=models.PRESETS["vit_b16"], parameters=lambda: iter([torch.zeros(1)]))
    rng = np.random.default_rng(0)
    for width, height in ((500, 375), (340, 256)):
        files = [jpeg(width, height, rng) for _ in range(32)]
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i}.jpg" for i in range(n)]
            for i, path in enumerate(paths):
                path.write_bytes(files[i % 32])
            view, rates = evaluate.evaluation_view(model.config), []
            for _ in range(3):
                start = time.perf_counter()
                for path in paths[:n // 4]:
                    np.asarray(data.center_crop(Image.open(path).convert("RGB"), 224))
                times = [n / 4 / (time.perf_counter() - start)]
                start = time.perf_counter()
                for _ in torch.utils.data.DataLoader(evaluate._Pictures(paths, view), 32,
                                                     num_workers=evaluate.loader_processes(n)):
                    pass
                times.append(n / (time.perf_counter() - start))
                start = time.perf_counter()
                evaluate.encode_pictures(lambda images: images.mean((2, 3)), paths, model)
                rates.append([*times, n / (time.perf_counter() - start)])
            alone, loader_alone, ours = np.median(rates, 0)
            print(f"evaluation of {width} x {height} JPEGs, {evaluate.loader_processes(n)} processes, pictures/s: "
                  f"{ours:.0f}, its loader alone {loader_alone:.0f} ({ours / loader_alone:.2f}); Pillow in one "
                  f"process {alone:.0f}", flush=True)


def recall(images=50_000, texts=1_000_000, width=64):
    """Retrieval among a million captions: time, memory, and the ranks of some queries by a plain sort."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(images, (texts,), generator=generator)
    a = torch.nn.functional.normalize(torch.randn(images, width, generator=generator), dim=1)
    b = torch.nn.functional.normalize(a[owners] + 0.25 * torch.randn(texts, width, generator=generator), dim=1)
    start = time.perf_counter()
    got = evaluate.recall_of_features(a, b, owners)
    seconds = time.perf_counter() - start
    some = torch.randperm(images, generator=generator)[:300]
    top = (a[some] @ b.T).topk(10, dim=1).indices
    plain = {k: (owners[top[:, :k]] == some[:, None]).any(1).float().mean().item() for k in (1, 5, 10)}
    print(f"recall of {images:,} pictures among {texts:,} captions and back: {seconds:.0f} s, at most "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB; I2T R@1/5/10 "
          + " / ".join(f"{100 * x:.1f}" for x in got["i2t"].values()) + ", of 300 pictures by a plain sort "
          + " / ".join(f"{100 * x:.1f}" for x in plain.values()))


def in_data():
    """The data path."""
    for part in (index, order, worker, loader):
        part()


def evaluation():
    """Evaluation of pictures, and retrieval."""
    pictures()
    recall()


BENCHES = dict(steps=steps, parts=parts, memory=memory, scaling=scaling, data=in_data, tokenizer=words, head=head,
               start=start, evaluation=evaluation, index=index, order=order, worker=worker, loader=loader,
               pictures=pictures, recall=recall)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all but the last six")
    parser.add_argument("--data", nargs="+", help="tokenizer: captions of these, as train.py's --data")
    parser.add_argument("--root", default="data", help="where named data sets lie")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; one of {', '.join(BENCHES)}")
    names = given.names or list(BENCHES)[:-6]
    for name in names:
        if len(names) > 1:  # each in a process of its own: threads, memory and its peak are those of one alone
            of_data = ["--root", given.root, *(["--data", *given.data] if given.data else [])]
            subprocess.run([sys.executable, __file__, name, *of_data], check=False)
        elif name == "tokenizer" and given.data:
            words(list(data.Pairs(given.data, given.root).captions(40_000)))
        else:
            BENCHES[name]()


if __name__ == "__main__":
    main()
