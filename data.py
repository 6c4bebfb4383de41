"""From indexed pairs to batches: sources and their mixing, order, transforms, masks, collate.

A pair is the bytes of a picture file and its captions (support/shards.py, support/pictures.py).
What a batch holds is a pure function of (seed, epoch, index of the pair): any number of workers and
ranks, and any restart, sees the same.  Workers give uint8 pixels; `normalize` runs on the device.
Paper: section 3.2 (masks).  Ideas: SLIP (views), SimCLR (distortions), BEiT (blocks).

    pairs = Pairs(["cc3m", "cc12m:2"], "data")       # CC3M once and CC12M twice an epoch
    samples = Samples(pairs, tokenizer, model.needs, train_config, model.config)
    loader = make_loader(samples, pairs.sizes, seed, batch_size, 0, steps, ranks, workers=-1,
                         collate=samples.collate)
"""
import bisect
import math
import os
import re
import shlex
import signal
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from support.demo import draw_demo
from support.pictures import BAD_IMAGE, decode, open_picture, upright_size
from support.shards import IMAGE_SUFFIXES, Shards, cpu_count, find_shards, paths_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Our choice, if an evaluation set has no templates.txt.
TEMPLATES = ("{}", "a {}", "a picture of a {}", "a photo of a {}")


# ------------------------------------------------ pairs: what --data names

def find_data(name, root="data"):
    """The shards in ROOT/NAME or the path NAME, or in train/ there.  -> list of Path

    NAME may be one shard.  The demo is drawn first.  Raises ValueError with the command that packs
    it if NAME is something else, and FileNotFoundError if nothing is there.
    """
    if name == "demo":
        draw_demo(Path(root, "demo"))
    paths = paths_of(name, root)
    for path in paths:
        if path.is_file() and path.suffix == ".tar":
            return [path]
        for folder in (path, path / "train"):
            shards = find_shards(folder)
            if shards:
                return shards
    for path in paths:
        names = sorted(os.listdir(path)) if path.is_dir() else []
        if path.is_file() or names:
            kind = f"a folder with {', '.join(names[:3])}" if names else f"a {path.suffix} file"
            raise ValueError(f"{path} is {kind}, and training reads tar shards: convert it once by "
                             f"python tools/prepare.py pack {shlex.quote(str(path))} --out DIR "
                             "(of a folder name its table, or add --classes if its folders are "
                             "classes)")
    looked = ", ".join(f"{path}, {path / 'train'}" for path in paths)
    raise FileNotFoundError(
        f"no data set '{name}': looked in {looked} for shards, *.tar with KEY.jpg and KEY.txt as "
        "img2dataset writes them (--root or $MASKCLIP_DATA name another folder; docs/data.md says "
        "how to get the data sets)")


def _split_weight(name, root):
    """NAME:2 -> NAME, 2.  Raises ValueError for a weight that is not a whole number above 0."""
    path, colon, weight = name.rpartition(":")
    is_number = colon and re.fullmatch(r"-?[\d.]+", weight)
    if not is_number or Path(name).exists() or Path(root, name).exists():
        return name, 1
    if not weight.isdecimal() or not 0 < int(weight) < 1000:
        raise ValueError(f"the weight in --data {name} must be a whole number from 1 to 999: how "
                         "often a pair is taken in each epoch")
    return path, int(weight)


class Pairs:
    """The pairs of several data sets as one collection, as --data names them.

    NAME:2 is in it twice.

    pairs[i] -> (bytes of a picture file, [captions]); raises one of BAD_IMAGE.
    sizes: (shards of all sources, repeats included) int64, the pairs of each, for EpochOrder.
    fingerprint: equal for equal shards in the same order.  warnings: sentences.
    Raises what find_data raises, and FileNotFoundError if a source has no pairs.
    """

    def __init__(self, names, root="data"):
        folders = {}  # (folder, weight) -> its shards, because a shell makes *.tar many names
        for name in names:
            path, weight = _split_weight(name, root)
            for shard in find_data(path, root):
                folders.setdefault((shard.parent, weight), []).append(shard.name)
        self.sources = []
        self.starts = [0]  # of each source, and the end of the last
        sizes = []
        for (folder, weight), shard_names in folders.items():
            source = Shards(folder, shard_names)
            if not len(source):
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise FileNotFoundError("; ".join([
                    f"no pairs in {folder}: no picture ({suffixes}) with a caption",
                    *source.warnings[:3]]))
            self.sources.append(source)
            self.starts.append(self.starts[-1] + weight * len(source))
            sizes.append(np.tile(source.sizes, weight))
        self.sizes = np.concatenate(sizes)
        self.warnings = [line for source in self.sources for line in source.warnings]
        content = repr((self.sizes.tolist(), [source.fingerprint for source in self.sources]))
        self.fingerprint = f"{len(self)} pairs, {zlib.crc32(content.encode()):08x}"

    def __len__(self):
        return self.starts[-1]

    def _find(self, i):
        """-> a source, the number of the pair in it"""
        number = bisect.bisect_right(self.starts, i) - 1
        source = self.sources[number]
        return source, (i - self.starts[number]) % len(source)  # %: a source of weight 2 is twice

    def __getitem__(self, i):
        source, row = self._find(i)
        return source.read(row)

    def name(self, i):
        """Where a pair lies, for messages."""
        source, row = self._find(i)
        return source.name(row)

    def captions(self, limit):
        """The captions of `limit` pairs, spread evenly, to learn a vocabulary from (iterator)."""
        n = min(limit, len(self))
        for k in range(n):
            source, row = self._find(k * len(self) // n)
            try:
                yield from source.captions(row)
            except BAD_IMAGE:
                continue  # named when training draws the pair


# ------------------------------------------------ order: which pairs a step reads

class EpochOrder:
    """Which pair has which position in an epoch: a pure function of (seed, epoch, position).

    The shards are permuted and cut into groups of about `window` pairs; the pairs of each group are
    permuted.  So what is read together lies in a few shards, and the order of one group is enough.
    """

    def __init__(self, sizes, seed, window=100_000):  # our choice: ten shards of 10,000, some 3 GB
        self.sizes = np.asarray(sizes)      # (S,) pairs of each shard
        self.ends = np.cumsum(self.sizes)   # (S,) where each shard ends in the collection
        self.n = int(self.ends[-1])
        self.seed = seed
        self.window = window
        self._epoch = None                  # the epoch and the group that were drawn last
        self._group = None

    def _rng(self, epoch, *key):
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch], spawn_key=key))

    def _draw_shards(self, epoch):
        """The epoch's order of the shards, and which of them make a group."""
        self._epoch = epoch
        self._group = None
        self._shards = self._rng(epoch, 0).permutation(len(self.sizes))     # (S,)
        sizes = self.sizes[self._shards]
        self._shard_ends = np.cumsum(sizes)                                 # (S,) in the epoch
        group = (self._shard_ends - sizes) // self.window                   # (S,) never decreases
        firsts = np.flatnonzero(np.diff(group, prepend=-1))
        self._firsts = np.append(firsts, len(sizes))                        # (groups + 1,)

    def _draw_group(self, epoch, group):
        """The indices of a group's pairs in the epoch's order."""
        first, last = self._firsts[group:group + 2]
        begin = int(self._shard_ends[first - 1]) if first else 0
        ends = self._shard_ends[first:last]
        positions = begin + self._rng(epoch, 1, group).permutation(int(ends[-1]) - begin)
        # From a position before the pairs are permuted to the pair's index in the collection.
        shift = self.ends[self._shards[first:last]] - ends
        self._group = group
        self._begin = begin
        self._indices = positions + shift[np.searchsorted(ends, positions, "right")]

    def __call__(self, epoch, start, stop):
        """-> (stop - start,) int64, the indices of the pairs at these positions of an epoch"""
        if epoch != self._epoch:
            self._draw_shards(epoch)
        parts = []
        while start < stop:
            shard = np.searchsorted(self._shard_ends, start, "right")
            group = int(np.searchsorted(self._firsts, shard, "right")) - 1
            if group != self._group:
                self._draw_group(epoch, group)
            parts.append(self._indices[start - self._begin:stop - self._begin])
            start += len(parts[-1])
        return np.concatenate(parts)


class GlobalBatchSampler(torch.utils.data.Sampler):
    """This rank's share of the global batches of steps first ... last - 1: lists of (epoch, index).

    Epochs follow one another without a gap: step s takes positions s * B ... (s + 1) * B - 1 of
    that stream, so no pair is left out.  Rank r of W takes rows r * B/W ... (r + 1) * B/W - 1 of
    them, so the global batches do not depend on W.
    """

    def __init__(self, order, batch_size, first, last, rank=0, world_size=1):
        self.order = order
        self.batch_size = batch_size
        self.steps = range(first, last)
        self.rows = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            keys = []
            while len(keys) < len(self.rows):  # more than once if an epoch ends in the batch
                position = step * self.batch_size + self.rows.start + len(keys)
                epoch, start = divmod(position, self.order.n)
                stop = min(self.order.n, start + len(self.rows) - len(keys))
                keys += [(epoch, index) for index in self.order(epoch, start, stop).tolist()]
            yield keys


# ------------------------------------------------ transforms: PIL in, PIL out

def crop_box(width, height, scale, rng, ratio=(3 / 4, 4 / 3)):
    """Inception's random crop, as torchvision draws it.  -> x, y, w, h in pixels

    scale: least and most share of the area; ratio: least and most width / height.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # A very long picture: the largest middle part of an allowed aspect.
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def crop(image, box, size, full_size=None, resample=Image.BILINEAR):
    """A box (x, y, w, h), resized to a square.  full_size: what it is measured in, if larger."""
    x, y, w, h = box
    kx, ky = np.divide(image.size, full_size or image.size).tolist()
    return image.resize((size, size), resample, (kx * x, ky * y, kx * (x + w), ky * (y + h)))


def distort(image, rng):
    """SLIP's distortion of a SimCLR view: jitter, grey, blur, mirror."""
    if rng.random() < 0.8:                                                       # SLIP
        for change in rng.permutation(4):
            if change == 3:  # hue: a turn of at most a tenth of the circle        SLIP
                hue, saturation, value = image.convert("HSV").split()
                turn = np.uint8(rng.integers(-25, 26) % 256)
                hue = Image.fromarray(np.asarray(hue) + turn)  # wraps around
                image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
            else:
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
                image = enhance[change](image).enhance(rng.uniform(0.6, 1.4))    # SLIP
    if rng.random() < 0.2:                                                       # SLIP
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:                                                       # SLIP
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))    # SimCLR
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def center_crop(image, size, resample=Image.BICUBIC, short=None):
    """CLIP's evaluation view: the shorter side resized to `short`, then the middle square."""
    short = short or size
    image = image.resize([short * side // min(image.size) for side in image.size], resample)
    x, y = (round((side - size) / 2) for side in image.size)  # as torchvision rounds
    return image.crop((x, y, x + size, y + size))


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """uint8 pixels (..., H, W, 3) on any device -> float32 (..., 3, H, W)."""
    images = images.movedim(-1, -3)
    images = images.to(torch.float32, memory_format=torch.contiguous_format)     # (..., 3, H, W)
    # In place, because new memory costs a CPU more than the arithmetic.
    return images.sub_(_channels(mean, images.device)).div_(_channels(std, images.device))


@lru_cache
def _channels(shares, device):
    """(3, 1, 1), shares of 255; made once, because to copy a tensor to a GPU is to wait for it."""
    return (torch.tensor(shares, device=device) * 255)[:, None, None]


# ------------------------------------------------ masks: True = hidden from the student

def _count_hidden(n_patches, ratio):
    if not 0 <= ratio <= 1:
        raise ValueError(f"the share of hidden patches must be from 0 to 1, not {ratio}")
    return round(ratio * n_patches)


def random_mask(n_patches, ratio, rng):
    """Hide exactly round(ratio * n_patches) random patches (paper, MAE).

    -> bool (n_patches,), True = hidden from the student
    """
    mask = np.zeros(n_patches, bool)
    mask[rng.permutation(n_patches)[:_count_hidden(n_patches, ratio)]] = True
    return mask


def block_mask(grid, ratio, rng):
    """Hide exactly round(ratio * n) patches of a grid (rows, columns) in blocks (BEiT).

    Blocks of random area and aspect are laid on the grid until enough is hidden; the last block
    hides only as many patches as are missing.  -> bool (n,), True = hidden from the student
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    smallest = rows * columns * 16 / 196  # BEiT: 16 of 196 patches
    missing = _count_hidden(rows * columns, ratio)
    while missing:
        for a, b, c, d in rng.random((16, 4)).tolist():  # many at once: this runs for each sample
            area = smallest + a * (max(smallest, missing) - smallest)
            aspect = math.exp((2 * b - 1) * math.log(1 / 0.3))  # BEiT: from 0.3 to 1 / 0.3
            h = min(rows, max(1, round(math.sqrt(area * aspect))))
            w = min(columns, max(1, round(math.sqrt(area / aspect))))
            y = int(c * (rows - h + 1))
            x = int(d * (columns - w + 1))
            block = mask[y:y + h, x:x + w]
            new = min(missing, h * w - np.count_nonzero(block))
            if new == missing:
                block[np.unravel_index(np.flatnonzero(~block)[:new], block.shape)] = True
                return mask.ravel()
            block[:] = True
            missing -= new
    return mask.ravel()


def _mask_tokens(is_end, ratio, draws):
    """Which tokens to mask: a share of those between start and end, at least one if there is any.

    is_end (B, L) bool, draws (B, >= L) in [0, 1): the lowest are masked.  -> bool (B, L)
    """
    inner = is_end.int().argmax(1, keepdim=True) - 1                  # (B, 1) tokens between
    position = torch.arange(is_end.size(1))                           # (L,)
    outside = (position < 1) | (position > inner)                     # (B, L)
    draws = draws[:, :is_end.size(1)].masked_fill(outside, 2.0)       # (B, L) 2: after all others
    count = torch.minimum(inner, (ratio * inner).round().clamp(min=1))
    return draws.argsort(1).argsort(1) < count                        # (B, L)


# ------------------------------------------------ batches

class Samples(torch.utils.data.Dataset):
    """(epoch, index) -> one training sample; what is random comes from (seed, epoch, index).

    needs: what the method's forward reads, any of images, views, text, mask, mlm (model.needs).
    config: train.TrainConfig.  model_config: model.ModelConfig.
    A pair that cannot be used is replaced by a random one, which (seed, epoch, index) decides, and
    named in "bad".
    """

    def __init__(self, pairs, tokenizer, needs, config, model_config):
        self.pairs = pairs
        self.tokenizer = tokenizer
        self.needs = needs
        self.config = config
        self.model_config = model_config

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([self.config.seed, epoch, index])
        bad = []
        while True:
            try:
                return dict(self.sample(index, rng), bad=bad)
            except BAD_IMAGE as error:
                bad.append(f"{self.pairs.name(index)}: {error}")
                if len(bad) == 20:  # our choice: no accident
                    raise ValueError("20 bad pairs in a row, the data is damaged: "
                                     + "; ".join(bad[:3])) from error
                index = int(rng.integers(len(self.pairs)))

    def sample(self, index, rng):
        """A pair as the method needs it.  Raises one of BAD_IMAGE."""
        content, captions = self.pairs[index]
        image = open_picture(content)
        size = self.model_config.image_size
        full_size = upright_size(image)
        chosen = int(rng.integers(len(captions))) if len(captions) > 1 else 0
        # All boxes are drawn first, so that the picture is decoded no larger than they need.
        shares = []
        if "images" in self.needs:
            shares += [self.config.crop_min]
        if "views" in self.needs:
            shares += [0.08, 0.08]  # SLIP
        boxes = [crop_box(*full_size, (share, 1.0), rng) for share in shares]
        image = decode(image, min(min(w, h) for _, _, w, h in boxes) / size)
        crops = [crop(image, box, size, full_size) for box in boxes]
        sample = dict(caption=captions[chosen], rng=rng)
        if "images" in self.needs:
            sample["images"] = np.asarray(crops[0])                           # (H, W, 3)
        if "views" in self.needs:
            views = [distort(view, rng) for view in crops[-2:]]
            sample["views"] = np.stack(views)                                 # (2, H, W, 3)
        return sample

    def collate(self, samples):
        """A list of B samples -> batch: the tensors that the method needs, and "bad", list of str.

        images (B, H, W, 3) and views (B, 2, H, W, 3) uint8; ids_keep, ids_hide: (B, n) visible and
        hidden patches; tokens (B, L), as long as the longest text; mlm_tokens (B, L), masked at
        mlm_ids (R,) of the flattened (B, L); mlm_targets (R,).
        """
        rngs = [sample["rng"] for sample in samples]
        batch = dict(bad=[line for sample in samples for line in sample["bad"]])
        for name in ("images", "views"):
            if name in self.needs:
                batch[name] = torch.from_numpy(np.stack([sample[name] for sample in samples]))
        if "mask" in self.needs:  # here, because in one loop they take half the time
            masks = [self._mask(rng) for rng in rngs]
            batch["ids_keep"] = torch.from_numpy(np.stack([np.flatnonzero(~m) for m in masks]))
            batch["ids_hide"] = torch.from_numpy(np.stack([np.flatnonzero(m) for m in masks]))
        most = self.model_config.context_length
        if "text" in self.needs:
            tokens = self.tokenizer([sample["caption"] for sample in samples], most)
            if self.config.compile:  # each other length would compile all blocks again
                length = min(most, math.ceil(tokens.size(1) / 8) * 8)
                tokens = F.pad(tokens, (0, length - tokens.size(1)))
            batch["tokens"] = tokens                                          # (B, L)
        if "mlm" in self.needs:
            draws = torch.from_numpy(np.stack([rng.random(most) for rng in rngs]))
            masked = _mask_tokens(tokens == self.tokenizer.eot, self.config.mlm_ratio, draws)
            batch["mlm_tokens"] = tokens.masked_fill(masked, self.tokenizer.mask)
            batch["mlm_ids"] = masked.flatten().nonzero()[:, 0]               # (R,)
            batch["mlm_targets"] = tokens.flatten()[batch["mlm_ids"]]         # (R,)
        return batch

    def _mask(self, rng):
        side = self.model_config.grid
        if self.config.mask == "block":
            return block_mask((side, side), self.config.mask_ratio, rng)
        return random_mask(side * side, self.config.mask_ratio, rng)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # they end a run in good order


def ignore_signals(*_):
    """For loader processes: Ctrl-C and schedulers signal them too, but the main process answers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, sizes, seed, batch_size, first_step, last_step, ranks, workers,
                collate=None):
    """This rank's share of the global batches of steps first_step ... last_step - 1, in order.

    dataset: (epoch, index) -> sample.  sizes, seed: EpochOrder's.  batch_size: global.
    ranks: support.runtime.Ranks.  workers: processes of this rank; -1: by the number of cores.
    """
    if workers < 0:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        workers = max(0, min(8, cpu_count() // ranks_here - 1))  # our choice: a core for the rank
    sampler = GlobalBatchSampler(EpochOrder(sizes, seed), batch_size, first_step, last_step,
                                 ranks.rank, ranks.world_size)
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
        pin_memory=ranks.device.type == "cuda", worker_init_fn=ignore_signals)
