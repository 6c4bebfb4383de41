"""Benchmarks: each compares things in one run and prints the ratio.  No test depends on them.

    python tests/bench.py                 all
    python tests/bench.py loader index    some

`loader` compares with open_clip's chain too where it is installed (tests/peers.txt, .ci/run).
"""
import importlib.util
import io
import resource
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import evaluate
import model as models
import tokenizer

CAPTION = "a photo of an old wooden boat on the shore of a quiet lake in the early morning, number {}"


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
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pictures) * copies)
    for number in range(0, len(order), shard_size):
        with tarfile.open(folder / f"{number // shard_size:05d}.tar", "w") as tar:
            for i in order[number:number + shard_size]:
                data.add_member(tar, f"{i:09d}.jpg", pictures[i % len(pictures)])
                data.add_member(tar, f"{i:09d}.txt", CAPTION.format(i).encode())
    return folder


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
    config = SimpleNamespace(seed=seed, crop_min=0.5, mask="block", mask_ratio=0.75, mlm_ratio=0.2)
    shape = SimpleNamespace(image_size=224, grid=14, context_length=77)
    samples = data.Samples(pairs, tokenizer.Tokenizer.clip(), needs, config, shape)
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


def memory(n=20_000):
    """What a worker process holds after 2,000 and after 20,000 samples of MaskCLIP's batches."""
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


if __name__ == "__main__":
    for name in sys.argv[1:] or ("index", "order", "memory", "loader", "head", "pictures", "recall"):
        globals()[name]()
