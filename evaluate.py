"""Frozen evaluation of a checkpoint, ours or a peer's: zero-shot, retrieval, linear probe, patch-word segmentation.

Sources: CLIP (prompt ensembles, linear probe by L-BFGS), ELEVATER (ICinW), CLIP_benchmark (recall), vision-evaluation
(metrics), MoCo v3 (linear probe by SGD), Zhou et al. 2022 (dense scores without training).  Names and templates of data
sets stand in prompts.json.  The newest checkpoint under runs/ is taken unless --checkpoint.

    python evaluate.py --zeroshot imagenet icinw --retrieval flickr30k coco --linear imagenet
    python evaluate.py --zeroshot FOLDER/WITH/CLASS/FOLDERS --checkpoint runs/demo-maskclip/last.pt ViT-B-16.pt
    python evaluate.py --heatmap picture.png "a red star above a blue circle"
    python evaluate.py --report runs/a runs/b
    python evaluate.py --compare runs/a runs/b
"""
import argparse
import dataclasses
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import statistics
import struct
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import data
import model as models
import tokenizer as words
from downstream import pictures
from tokenizer import Tokenizer, write_atomically

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP

# ---------------------------------------------------------------- loading

def newest_checkpoint(runs="runs"):
    """The last.pt under `runs` that was written last.  Raises FileNotFoundError where there is none."""
    found = sorted(Path(runs).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no checkpoint under {Path(runs).resolve()}: train one (python train.py) or name one "
                                "with --checkpoint")
    return found[-1]


def read_checkpoint(path):
    """A checkpoint of train.py as a dict, without running any code in it.  Raises FileNotFoundError or ValueError."""
    state = _load(path)
    if "model_config" not in state:
        raise ValueError(f"{path} is not a checkpoint of this project: it has no 'model_config'")
    return state


# What torch.load has been seen to raise on files that are spoilt or of another kind.
DAMAGED = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError,
           struct.error, OSError, zipfile.BadZipFile)
NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def weights_file(path):
    """The file of weights: `path`, or Hugging Face's or open_clip's file in the folder `path`."""
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path} is a folder without {', '.join(NAMES)}")
        return found
    return path


def _load(path):
    """What a file of weights holds, as a dict; no code in it is run."""
    path = weights_file(path)
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if program := next((name for name in archive.namelist() if name.endswith("/constants.pkl")), None):
                    return _Script(archive, program.partition("/")[0]).state()
        # A Namespace holds attributes and does nothing; SLIP's, MAE's and timm's files have their arguments in one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.filename:  # not there, no file, not ours to read
            raise
        lines = str(error).splitlines() or [""]
        program = next((line for line in lines if "Unsupported global" in line or "asks for" in line), None)
        what = "would run code, which is not done here" if program else "is not a checkpoint, or is damaged"
        raise ValueError(f"{path} {what} ({type(error).__name__}: {(program or lines[0]).strip()[:150]})") from error
    return state if isinstance(state, dict) else {}


def read_safetensors(path):
    """Hugging Face's format: the size of a JSON header (8 bytes), the header, the tensors' bytes.  -> {name: tensor}"""
    kinds = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
                 I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)
    content = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    size = int.from_bytes(content[:8].numpy().tobytes(), "little")
    if size > len(content) - 8:
        raise ValueError(f"a header of {size} bytes in a file of {len(content)}")
    header, body, tensors = json.loads(content[8:8 + size].numpy().tobytes()), content[8 + size:], {}
    for name, facts in header.items():
        if name != "__metadata__":
            start, stop = facts["data_offsets"]
            if not 0 <= start <= stop <= len(body):
                raise ValueError(f"the file ends before {name}")
            tensors[name] = body[start:stop].clone().view(kinds[facts["dtype"]]).view(facts["shape"])
    return tensors


class _Script(pickle.Unpickler):
    """The tensors of a TorchScript archive, as OpenAI's downloads are: its program is neither read nor run."""

    class Module:
        """Stands for every class of the program; its state becomes its attributes."""

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.read = lambda name: archive.read(f"{folder}/data/{name}")

    def find_class(self, module, name):
        """Modules, tensors, lists of numbers; UnpicklingError for all else."""
        if module.startswith("__torch__"):
            return self.Module
        kinds = dict(FloatStorage=torch.float32, HalfStorage=torch.float16, LongStorage=torch.int64,
                     IntStorage=torch.int32, DoubleStorage=torch.float64, BoolStorage=torch.bool,
                     BFloat16Storage=torch.bfloat16)
        if module == "torch" and name in kinds:
            return kinds[name]
        plain = {"torch._utils._rebuild_tensor_v2": lambda rows, offset, size, stride, *_:
                 rows.as_strided(size, stride, offset), "collections.OrderedDict": dict,
                 "torch.jit._pickle.restore_type_tag": lambda value, *_: value,
                 **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")}}
        if f"{module}.{name}" not in plain:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not loaded")
        return plain[f"{module}.{name}"]

    def persistent_load(self, key):
        """A storage: ("storage", kind, name, device, count) -> 1-d tensor"""
        _, kind, name, _, _ = key
        return torch.frombuffer(bytearray(self.read(name)), dtype=kind)

    def state(self):
        """-> {dotted name: tensor}, and "torchscript": True"""
        def tensors(module, prefix=""):
            for name, x in vars(module).items():
                if isinstance(x, torch.Tensor):
                    yield prefix + name, x
                elif isinstance(x, self.Module):
                    yield from tensors(x, f"{prefix}{name}.")
        return dict(tensors(self.load())) | {"torchscript": True}


# ---------------------------------------------------------------- other projects' weights, in our names

FORMATS = ("our checkpoints; OpenAI's CLIP, open_clip's and SLIP's weights; Hugging Face's CLIPModel; timm's, MAE's "
           "and BEiT's ViTs with a class token and absolute positions")
SETTINGS = ("config.json", "open_clip_config.json", "preprocessor_config.json", "merges.txt")
HEADS = {1280: 16}  # ViT-H (open_clip, MAE); the others have heads of 64


def read_weights(path):
    """Any weights that are known here (FORMATS), in our names.  No code in the file is run.

    -> {"model": {name: tensor}, "config": ModelConfig, "remarks": [str]}, and "tokenizer" where the merges are known.
    config.method names the kind: "slip", "simclr", "mae" and "vit" come without heads and decoders.  A normalisation of
    pixels other than ours is folded into the patch embedding.  Raises FileNotFoundError, or ValueError for all else.
    """
    state = _load(path)
    beside = {name: state[name] for name in ("architecture", "model_args", "pretrained_cfg") if name in state}
    for file in settings_beside(path):
        try:
            text = file.read_text("utf-8")
            beside |= dict(merges=text.strip().split("\n")[1:]) if file.name == "merges.txt" else json.loads(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is no JSON object, or no UTF-8 ({error})") from error
    try:
        found = _recognised(state, beside)
    except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is of a kind that is known, and does not fit it "
                         f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    if found is None:
        raise ValueError(f"{path} holds no weights that are known here ({FORMATS}); its first keys are "
                         f"{', '.join(list(map(str, _tensors(state)))[:4]) or 'none'}")
    return found


def settings_beside(path):
    """The settings and merges that belong to a file of weights from Hugging Face, open_clip or timm."""
    file = weights_file(path)
    names = SETTINGS if file.name in NAMES else ()
    return [file.parent / name for name in names if (file.parent / name).is_file()]


def _tensors(state):
    """What is a tensor in a dict of weights, or in the one that a training script put into it."""
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return {str(name).removeprefix("module."): x for name, x in state.items() if isinstance(x, torch.Tensor)}


def _recognised(state, beside):
    """The kind of weights by their names -> what read_weights returns, or None."""
    if {"model_config", "model"} <= state.keys():
        ours = dict(model=dict(state["model"]), config=models.ModelConfig(**state["model_config"]), remarks=[])
        if "tokenizer" in state:
            return ours | dict(tokenizer=state["tokenizer"])
        newest = state.get("teacher") or ours["model"]  # of downstream/'s runs: what they evaluate
        tower = {name: x for name, x in newest.items() if name.startswith("visual.")}
        return ours | dict(model=tower, config=dataclasses.replace(ours["config"], method="vit"),
                           remarks=["a tower that was trained further: its head is left out"])
    program, state = "torchscript" in state, _tensors(state)
    text = {"token_embedding.weight", "text_projection", "ln_final.weight", "positional_embedding"}
    towers = ({"visual.conv1.weight", "visual.class_embedding", "visual.proj"},
              {"visual.trunk.cls_token", "visual.trunk.norm.weight", "visual.head.proj.weight"})
    if any(text | image <= state.keys() for image in towers):
        return _clip(state, beside, program or "input_resolution" in state)
    if "visual.patch_embed.proj.weight" in state and (text | {"image_projection"} <= state.keys() or
                                                      "image_mlp.layer1.weight" in state):
        return _slip(state)
    if {"vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight"} <= state.keys():
        return _hugging_face(state, beside)
    if {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "cls_token", "norm.weight"} <= state.keys():
        return _timm(state, beside)
    return None


def _renamed(state, prefix, renames):
    """Names that start with `prefix` and hold a part of `renames` -> ours, in float32; the others are left out."""
    ours = {}
    for name, x in state.items():
        if name.startswith(prefix):
            for old, new in renames:
                name = name.replace(old, new)
            ours[name] = x.float()
    return ours


# parts of CLIP's names -> ours
CLIP_BLOCK = (("transformer.resblocks", "blocks"), ("ln_1", "norm1"), ("ln_2", "norm2"), ("c_fc", "fc1"),
              ("c_proj", "fc2"), ("in_proj_", "qkv."), ("out_proj", "proj"), ("positional_embedding", "pos_embed"))


def _finished(ours, method, mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD, remarks=(), merges=None, **known):
    """Folds the normalisation of pixels into the patch embedding, finds the shapes.  -> what read_weights returns

    merges: a vocabulary's, as "left right", where they lie beside the weights; else it must be CLIP's.
    """
    a = torch.tensor(data.IMAGENET_STD) / torch.tensor(std)  # their pixels are ours * a + b
    b = (torch.tensor(data.IMAGENET_MEAN) - torch.tensor(mean)) / torch.tensor(std)
    conv = ours["visual.patch_embed.proj.weight"]
    ours["visual.patch_embed.proj.weight"] = conv * a[:, None, None]
    ours["visual.patch_embed.proj.bias"] = (ours.get("visual.patch_embed.proj.bias", 0)
                                            + (conv * b[:, None, None]).sum((1, 2, 3)))
    width, _, patch, _ = conv.shape
    side = math.isqrt(ours["visual.pos_embed"].size(1) - 1)
    if side ** 2 + 1 != ours["visual.pos_embed"].size(1):
        raise ValueError(f"{ours['visual.pos_embed'].size(1)} positions are no square of patches and a class token")

    def depth(tower):
        return sum(name.startswith(f"{tower}.blocks.") and name.endswith("norm1.weight") for name in ours)
    shapes = dict(image_size=side * patch, patch_size=patch, width=width, depth=depth("visual"),
                  heads=HEADS.get(width, width // 64))
    if "text.token_embedding.weight" in ours:
        words = ours["text.token_embedding.weight"]
        if merges is None and len(words) != 49408:
            raise ValueError(f"its vocabulary has {len(words)} tokens: without a merges.txt beside it only CLIP's of "
                             "49,408 is known")
        if merges is not None and len(words) != len(merges) + 514:  # bytes, bytes that end a word, start, end
            raise ValueError(f"its vocabulary has {len(words)} tokens, and that of merges.txt {len(merges) + 514}")
        ours["text.token_embedding.weight"] = torch.cat([words, words.new_zeros(1, words.size(1))])  # [MASK]
        shapes |= dict(context_length=len(ours["text.pos_embed"]), text_width=words.size(1), text_depth=depth("text"),
                       text_heads=words.size(1) // 64, embed_dim=len(ours["text_projection.weight"]),
                       vocab_size=len(words) + 1)
    config = models.ModelConfig(method=method, **(shapes | known))
    found = dict(model=ours, config=config, remarks=list(remarks))
    return found if merges is None else found | dict(tokenizer=merges)


def _clip(state, beside, openai):
    """OpenAI's CLIP and open_clip's, whose image tower may be timm's."""
    config, view = beside.get("model_cfg", {}), beside.get("preprocess_cfg", {})
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    quick, remarks = openai or config.get("quick_gelu", False), []
    if not openai and "model_cfg" not in beside:  # the keys are the same for both
        remarks = ["the file does not say whether its towers have GELU or QuickGELU: GELU taken, as in open_clip's "
                   "models without 'quickgelu' in their names"]
    if view.get("resize_mode", "shortest") != "shortest":
        remarks.append(f"made for pictures resized by '{view['resize_mode']}': here they are cropped")
    if "visual.trunk.cls_token" in state:
        if vision.get("timm_pool", "token") != "token":
            raise ValueError(f"its image feature is timm's '{vision['timm_pool']}' of the tokens, not the class token")
        ours = _renamed(state, "visual.trunk.", (("visual.trunk.", "visual."),))
        ours["image_projection.weight"] = state["visual.head.proj.weight"].float()
        known = _timm_settings(state, {"architecture": vision.get("timm_model_name", "")} | beside, quick)
    else:
        ours = _renamed(state, "visual.", (("visual.transformer.resblocks", "visual.blocks"), ("ln_pre", "norm_pre"),
                                           ("ln_post", "norm"), *CLIP_BLOCK))
        ours["visual.patch_embed.proj.weight"] = ours.pop("visual.conv1.weight")
        ours["visual.cls_token"] = ours.pop("visual.class_embedding")[None, None]
        ours["visual.pos_embed"] = ours["visual.pos_embed"][None]
        ours["image_projection.weight"] = ours.pop("visual.proj").T
        known = dict(pre_norm="visual.ln_pre.weight" in state, quick_gelu=(quick, quick),
                     image_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5))
        if "head_width" in vision:
            known["heads"] = vision["width"] // vision["head_width"]
    if "heads" in text:
        known["text_heads"] = text["heads"]
    return _finished(ours | _clip_text(state), "clip", view.get("mean", CLIP_MEAN), view.get("std", CLIP_STD), remarks,
                     beside.get("merges"), interpolation=_named(view), **known)


def _named(view):
    """The interpolation that a file of settings names, by a word or by Pillow's number; bicubic where it does not."""
    said = view.get("interpolation") or view.get("resample")
    return "bilinear" if said in ("bilinear", int(Image.BILINEAR)) else "bicubic"


def _clip_text(state):
    """The text tower of OpenAI's CLIP, open_clip and SLIP."""
    parts = ("transformer.resblocks.", "positional_embedding", "token_embedding", "ln_final")
    ours = {f"text.{name}": x for name, x in _renamed(state, parts, (*CLIP_BLOCK, ("ln_final", "norm"))).items()}
    return ours | {"text_projection.weight": state["text_projection"].float().T,
                   "logit_scale": state["logit_scale"].float()}


def _slip(state):
    """SLIP's CLIP, SLIP and SimCLR: timm's ViT, 12 heads in ViT-S; evaluated through bilinear resizing."""
    ours = _renamed(state, "visual.", ())
    kind = "clip" if "image_projection" in state else "simclr"
    if kind == "clip":
        kind = "slip" if "image_mlp.layer1.weight" in state else "clip"
        ours |= _clip_text(state) | {"image_projection.weight": state["image_projection"].float().T}
    width = len(ours["visual.patch_embed.proj.weight"])
    return _finished(ours, kind, interpolation="bilinear", heads=16 if width == 1024 else 12)


def _hugging_face(state, beside):
    """Hugging Face's CLIPModel."""
    renames = (("vision_model.", "visual."), ("text_model.", "text."), ("encoder.layers", "blocks"),
               ("layer_norm", "norm"), ("self_attn.out_proj", "attn.proj"), ("pre_layrnorm", "norm_pre"),
               ("post_layernorm", "norm"), ("final_norm", "norm"),
               ("embeddings.patch_embedding", "patch_embed.proj"), ("embeddings.token_embedding", "token_embedding"),
               ("embeddings.position_embedding.weight", "pos_embed"), ("embeddings.class_embedding", "cls_token"),
               ("visual_projection", "image_projection"))
    ours = _renamed({name: x for name, x in state.items() if not name.endswith("position_ids")},
                    ("vision_model.", "text_model.", "visual_projection", "text_projection", "logit_scale"), renames)
    for name in [name for name in ours if ".self_attn.q_proj." in name]:
        parts = [ours.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        ours[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    ours["visual.cls_token"] = ours["visual.cls_token"][None, None]
    ours["visual.pos_embed"] = ours["visual.pos_embed"][None]
    towers = [beside.get(f"{tower}_config") or {} for tower in ("vision", "text")]
    known = dict(pre_norm=True, image_norm_eps=towers[0].get("layer_norm_eps", 1e-5), interpolation=_named(beside),
                 quick_gelu=tuple(tower.get("hidden_act", "quick_gelu") == "quick_gelu" for tower in towers))
    for tower, field in zip(towers, ("heads", "text_heads"), strict=True):
        if "num_attention_heads" in tower:
            known[field] = tower["num_attention_heads"]
    remarks = [] if beside.keys() - {"merges"} else ["no config.json beside the file: QuickGELU, CLIP's mean and "
                                                     "deviation of pixels taken"]
    return _finished(ours, "clip", beside.get("image_mean", CLIP_MEAN), beside.get("image_std", CLIP_STD), remarks,
                     beside.get("merges"), **known)


def _timm_settings(state, beside, quick_text=True):
    """What the shapes of timm's ViT do not say, by its config.json or, where that is not there, by its name."""
    name, given = beside.get("architecture", ""), beside.get("model_args", {})
    act = given.get("act_layer", "quick_gelu" if "quickgelu" in name else "gelu")
    known = dict(pre_norm=any(name.endswith("norm_pre.weight") for name in state),
                 quick_gelu=(act == "quick_gelu", quick_text), image_norm_eps=1e-5 if "_clip_" in name else 1e-6)
    return known | ({"heads": given["num_heads"]} if "num_heads" in given else {})


def _timm(state, beside):
    """timm's, MAE's and BEiT's ViTs, without their heads and decoders."""
    for name in state:
        if "relative_position" in name or "gamma_" in name:
            raise ValueError(f"it has {name}: BEiT's relative positions and layer scale are not known here")
    for name in [name for name in state if name.endswith("attn.q_bias")]:  # BEiT's keys have no bias
        q, v = (state.pop(name.replace("q_bias", f"{part}_bias")) for part in "qv")
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    heads = ("head.", "fc_norm.", "decoder", "mask_token")
    ours = {f"visual.{name}": x.float() for name, x in state.items() if not name.startswith(heads)}
    view = beside.get("pretrained_cfg", {})
    remarks = [] if view else ["the file does not name the mean and deviation of its pixels: ImageNet's taken (MAE and "
                               "DeiT have these; some of timm's have 0.5)"]
    return _finished(ours, "mae" if "mask_token" in state else "vit", view.get("mean", data.IMAGENET_MEAN),
                     view.get("std", data.IMAGENET_STD), remarks, interpolation=_named(view),
                     **_timm_settings(state, beside))


def load_model(path):
    """Any weights that read_weights knows -> (model in eval mode, tokenizer; None for models without text).

    Raises FileNotFoundError, or ValueError for what is no checkpoint, is damaged, or is of another version.
    """
    weights = read_weights(path)
    config, has_text = weights["config"], "text_projection.weight" in weights["model"]
    try:
        if "tokenizer" in weights:
            model = models.build(config)
        else:
            model = (models.CLIP if has_text else models.VisionModel)(config)
        model.load_state_dict(weights["model"])
        tokenizer = (saved_tokenizer(weights) if "tokenizer" in weights else Tokenizer.clip()) if has_text else None
    except (LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit model.py: {' '.join(str(error).split())[:300]}") from error
    model.remarks = weights["remarks"]
    return model.eval(), tokenizer


def saved_tokenizer(state):
    """The tokenizer of a checkpoint, which holds its merges as "left right"."""
    return Tokenizer([tuple(line.split(" ")) for line in state["tokenizer"]])


# ---------------------------------------------------------------- features

def _device(model):
    return next(model.parameters()).device


class _Pictures(torch.utils.data.Dataset):
    """Pictures of a data.TestSet, or paths -> uint8 pixels (H, W, 3), by a view: function(picture) -> PIL picture."""

    def __init__(self, pictures, view):
        self.pictures, self.view = pictures, view

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        """Raises ValueError that names the file where it cannot be read: no test picture is ever left out."""
        return torch.from_numpy(np.array(self.view(data.load_picture(self.pictures[i]))))


RESAMPLE = dict(bicubic=Image.BICUBIC, bilinear=Image.BILINEAR)


def evaluation_view(config, squash=False):
    """The format's own view: resized (ModelConfig.interpolation) and cropped, or squashed to a square."""
    resample = RESAMPLE[config.interpolation]
    if squash:
        return partial(Image.Image.resize, size=(config.image_size, config.image_size), resample=resample)
    return partial(data.center_crop, size=config.image_size, resample=resample)


def loader_processes(count):
    """How many a rank starts for `count` pictures: one core is left to the model, as in training.

    Without it, a model on the CPU waits for its own threads.  A small set is done before a process has started.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(8, (os.cpu_count() or 1) // here - 1, count // 1000))


def ranks():
    """-> rank, number of ranks"""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def shared_out(encode, items):
    """encode(items) -> (n, ...) on the CPU, each rank doing its part: every item once, none added to even parts out."""
    rank, world = ranks()
    if world == 1:
        return encode(items)
    mine = together(lambda: encode(items[rank::world]) if items[rank::world] else None)
    shape, dtype = on_first_rank(lambda: (mine.shape[1:], mine.dtype))
    rows = torch.empty(len(items), *shape, dtype=dtype)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # train.py's group
    for other in range(min(world, len(items))):
        part = mine if other == rank else torch.empty(len(range(other, len(items), world)), *shape, dtype=dtype)
        part = part.to(device).contiguous()
        dist.broadcast(part, other)
        rows[other::world] = part.cpu()
    return rows


def together(function):
    """function() on every rank -> its value there.  What one of them raises is raised by all: nobody waits for it."""
    if ranks()[1] == 1:
        return function()
    value, error, errors = None, None, [None] * ranks()[1]
    try:
        value = function()
    except (OSError, ValueError) as failed:
        error = FileNotFoundError(str(failed)) if isinstance(failed, FileNotFoundError) else ValueError(str(failed))
    dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error
    return value


def on_first_rank(function):
    """function() on rank 0 -> its value on all ranks, which wait."""
    got = [together(lambda: function() if ranks()[0] == 0 else None)]
    if ranks()[1] > 1:
        dist.broadcast_object_list(got)
    return got[0]


def quiet():
    """tqdm's `disable`: one bar, on a terminal; train.py and torchrun may have many ranks."""
    return None if os.environ.get("RANK", "0") == "0" else True


def finite(rows):
    """The rows; ValueError where the model gave numbers that are none: every comparison with them would be wrong."""
    if not rows.isfinite().all():
        raise ValueError(f"the model's features are not finite for {(~rows.flatten(1).isfinite().all(1)).sum()} of "
                         f"{len(rows)} inputs: is this a run that diverged?")
    return rows


@torch.no_grad()
def encode_pictures(encode, pictures, model, view=None):
    """encode(pixels (B, 3, H, W) normalised) over pictures, in order.  -> float32 on the CPU (n, ...)"""
    def encoded(pictures):
        # 32 pictures of 224 pixels take less than the 32 MiB above which malloc maps fresh pages each time
        batch_size = 256 if _device(model).type == "cuda" else 32
        loader = torch.utils.data.DataLoader(_Pictures(pictures, view or evaluation_view(model.config)), batch_size,
                                             num_workers=loader_processes(len(pictures)),
                                             worker_init_fn=data.ignore_ctrl_c)
        bar = tqdm(loader, "pictures", disable=quiet(), leave=False)
        return torch.cat([encode(data.normalize(batch.to(_device(model)))).float().cpu() for batch in bar])
    return finite(shared_out(encoded, pictures))


def encode_unit(model, pictures, view=None):
    """Unit image features (n, E) of pictures."""
    return F.normalize(encode_pictures(model.encode_image, pictures, model, view), dim=1)


@torch.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=512, alone=False):
    """Unit text features (n, E) on the CPU.  Batches hold texts of like length, so little is padding.

    alone: by this rank, without the others, of which each does its part else.
    """
    def encoded(texts):
        tokens = [tokenizer(text, model.config.context_length)[0] for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        out = torch.empty(len(texts), model.config.embed_dim)
        for start in tqdm(range(0, len(order), batch_size), "texts", disable=quiet(), leave=False):
            part = order[start:start + batch_size]
            rows = torch.nn.utils.rnn.pad_sequence([tokens[i] for i in part], batch_first=True)
            out[part] = F.normalize(model.encode_text(rows.to(_device(model))).float(), dim=1).cpu()
        return out
    return finite(encoded(texts) if alone else shared_out(encoded, texts))


def zeroshot_classifier(model, tokenizer, classnames, templates, alone=False):
    """One row per class: the mean of the unit features of its prompts, made unit again (CLIP).  -> (C, E)

    templates: sentences with {} in the place of the class name.  A class may be a list of names (SLIP).  alone: as in
    encode_texts.
    """
    names = [[one] if isinstance(one, str) else one for one in classnames]
    prompts = [template.replace("{}", name) for several in names for name in several for template in templates]
    features = encode_texts(model, tokenizer, prompts, alone=alone)
    features = features.split([len(several) * len(templates) for several in names])
    return F.normalize(torch.stack([rows.mean(0) for rows in features]), dim=1)


class Cache:
    """Keeps what took long beside a checkpoint (in the user's cache where that folder is read-only); None: nothing.

    Found again by all that it depends on: the checkpoint's bytes, our code, and a key.
    """

    def __init__(self, path=None):
        self.path = path and weights_file(path)
        if path:
            digest = hashlib.sha256()
            with open(self.path, "rb") as file:
                for part in iter(partial(file.read, 2 ** 24), b""):
                    digest.update(part)
            self.sha256 = digest.hexdigest()
            files = [Path(module.__file__) for module in (data, models, words, sys.modules[__name__])]
            for file in [*settings_beside(path), *files]:
                digest.update(file.read_bytes())
            self.origin = digest.hexdigest()[:8]

    def _suffix(self, what, key):
        return f".{what}-{self.origin}-{hashlib.sha256(repr((self.sha256, key)).encode()).hexdigest()[:16]}.pt"

    def read(self, what, key):
        """What was written under this name and key; None where a rank does not see it, or it is damaged."""
        place, value, seen = self.path and data.made(self.path, self._suffix(what, key)), None, [None] * ranks()[1]
        try:
            value = place and torch.load(place, map_location="cpu", weights_only=True)
        except DAMAGED:
            place = None
        if ranks()[1] > 1:
            dist.all_gather_object(seen, bool(place))
        return value if place and False not in seen else None

    def write(self, what, key, value):
        """A tensor, or a dict of such; what was made of other weights, or by other code, goes.

        A full disk is a warning.
        """
        if self.path and ranks()[0] == 0:
            suffix = self._suffix(what, key)
            try:
                place = data.to_make(self.path, suffix)
                stem = glob.escape(place.name.removesuffix(suffix))
                for old in place.parent.glob(f"{stem}.{what}-????????-{'?' * 16}.pt"):
                    if f".{what}-{self.origin}-" not in old.name:
                        old.unlink(missing_ok=True)
                with data.making(place) as file:
                    torch.save(value, file)
            except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer on a full disk
                print(f"warning: {what} not kept for the next time: {error}", file=sys.stderr)

    def __call__(self, what, key, make):
        """What was written under this name and key, or make(), which all ranks call together, and which is kept."""
        value = self.read(what, key)
        if value is None:
            value = make()
            self.write(what, key, value)
        return value


# ---------------------------------------------------------------- metrics: tensors or arrays -> float in [0, 1]

def accuracy(scores, targets):
    """Share of rows whose highest score is the target's.  scores (n, C), targets (n,)"""
    return (torch.as_tensor(scores).argmax(1) == torch.as_tensor(targets)).double().mean().item()


def mean_per_class(scores, targets):
    """Recall averaged over the classes that occur.  scores (n, C), targets (n,)"""
    scores, targets = torch.as_tensor(scores), torch.as_tensor(targets)
    hit = (scores.argmax(1) == targets).double()
    return torch.stack([hit[targets == c].mean() for c in targets.unique()]).mean().item()


def map_11point(scores, targets):
    """VOC 2007's mean average precision as ELEVATER computes it.  scores (n, C), targets (n, C) of 0 and 1

    For recall 1.0, 0.9 .. 0: the best precision at that recall or above; mean over the 11, then over classes.  Equal
    scores are one cut.  At recall 0 the precision is 1 by definition (scikit-learn's last point of the curve).
    """
    means = []
    if not torch.as_tensor(targets).any(0).all():
        raise ValueError("11-point mAP needs a positive example of every class")
    for score, target in zip(torch.as_tensor(scores).double().T, torch.as_tensor(targets).double().T):
        score, order = score.sort(descending=True)
        hits = target[order].cumsum(0)
        cut = torch.cat([score[1:] != score[:-1], torch.tensor([True])])   # behind the last of equal scores
        precision = (hits / torch.arange(1, len(score) + 1))[cut]
        recall = (hits / target.sum())[cut]
        # 1e-9: hits / positives is compared with tenths, which are no binary fractions
        best = [precision[recall >= level / 10 - 1e-9].max().item() for level in range(1, 11)]
        means.append((sum(best) + 1.0) / 11)
    return sum(means) / len(means)


def roc_auc(scores, targets):
    """Area under the ROC curve: share of (positive, negative) pairs in order, ties counting half.

    scores (n,) or (n, 2), of which column 1 is used; targets (n,) of 0 and 1.
    """
    scores, targets = torch.as_tensor(scores), torch.as_tensor(targets)
    score = (scores[:, 1] if scores.ndim == 2 else scores).double()
    _, place, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place]        # 1-based, equal scores share their mean rank
    positives = (targets == 1).sum().double()
    negatives = len(score) - positives
    return ((rank[targets == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


def recall_at_k(similarity, text_to_image, ks=(1, 5, 10)):
    """similarity (n_images, n_texts), text_to_image (n_texts,) -> {"i2t": {k: r}, "t2i": {k: r}}  (CLIP_benchmark)

    i2t: share of images with at least one own text among the k most similar; t2i: share of texts whose image is.  Of
    equals the own one comes last: a model that tells nothing apart recalls nothing.
    """
    similarity, text_to_image = torch.as_tensor(similarity), torch.as_tensor(text_to_image)
    own = _own_texts(text_to_image, len(similarity))
    ahead = dict(i2t=_ahead(similarity, own), t2i=_ahead(similarity.T, text_to_image[:, None]))
    return {way: {k: (counts < k).float().mean().item() for k in ks} for way, counts in ahead.items()}


def recall_of_features(images, texts, text_to_image, ks=(1, 5, 10), block=2 ** 26):
    """recall_at_k of unit features (n, E), (m, E), of whose (n, m) similarities only `block` are held at a time."""
    text_to_image = torch.as_tensor(text_to_image)
    own = dict(i2t=_own_texts(text_to_image, len(images)), t2i=text_to_image[:, None])
    recall = {}
    for way, rows, columns in (("i2t", images, texts), ("t2i", texts, images)):
        size = max(1, block // len(columns))
        held = rows.new_empty(min(size, len(rows)), len(columns))  # one for all: new memory costs more than the product
        counts = torch.cat([_ahead(torch.mm(part, columns.T, out=held[:len(part)]), mine) for part, mine in
                            zip(rows.split(size), own[way].split(size), strict=True)])
        recall[way] = {k: (counts < k).float().mean().item() for k in ks}
    return recall


def _own_texts(text_to_image, n_images):
    """The texts of each image, (n_images, most texts of one), -1 where it has fewer."""
    counts = torch.bincount(text_to_image, minlength=n_images)
    order = text_to_image.argsort(stable=True)
    own = torch.full((n_images, max(1, int(counts.max()))), -1)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[text_to_image[order]]
    own[text_to_image[order], place] = order
    return own


def _ahead(similarity, own):
    """How many others are at least as similar as the best of a row's own columns, own (rows, few), -1 for none."""
    mine = similarity.gather(1, own.clamp(min=0)).masked_fill(own < 0, -torch.inf)          # (rows, few)
    best = mine.amax(1, keepdim=True)
    return (similarity >= best).sum(1, dtype=torch.int32) - (mine >= best).sum(1, dtype=torch.int32)  # twice as fast


# ---------------------------------------------------------------- evaluations
# Each returns a dict: "scores" {name: share in [0, 1]}, "chance" (of the first score), "over" (what was counted), and
# "protocol" (what one must know to compare the score).

NO_CACHE = Cache()
METRICS = {"accuracy": accuracy, "mean-per-class": mean_per_class, "11point_mAP": map_11point, "roc_auc": roc_auc}


def zeroshot(model, tokenizer, tests, cache=NO_CACHE, synonyms=False):
    """Zero-shot classification (CLIP) of a data.TestSet or a class folder.  "per_class" holds each class's recall.

    Of a class with several names the first is taken (ELEVATER); synonyms: all of them (SLIP).
    """
    tests = tests if isinstance(tests, data.TestSet) else data.test_set(tests, root="")
    if all(re.fullmatch(r"n\d{8}", several[0]) for several in tests.names):
        raise ValueError(f"{tests.place}: the classes are WordNet ids: give words.txt or --names, or, for ImageNet's "
                         "1,000, its name (imagenet) and --root")
    names = [several if synonyms else several[:1] for several in tests.names]
    classifier = cache("classifier", (names, tests.templates),
                       lambda: zeroshot_classifier(model, tokenizer, names, tests.templates))
    features = encode_unit(model, tests.pictures, evaluation_view(model.config, tests.squash))
    scores = (100 * features @ classifier.T).double().softmax(1)        # (n, C); ELEVATER's, which ranks over pictures
    metrics = {tests.metric: METRICS[tests.metric]} if tests.metric else {"top-1": accuracy,
                                                                          "mean per class": mean_per_class}
    one_each = tests.targets.ndim == 1
    return dict(scores={name: metric(scores, tests.targets) for name, metric in metrics.items()},
                chance=chance(tests), over=f"{len(scores):,} pictures of {len(names):,} classes", remarks=tests.remarks,
                per_class={name[0]: accuracy(scores[tests.targets == c], torch.tensor(c))
                           for c, name in enumerate(names) if one_each},
                protocol=about(tests) | dict(templates=len(tests.templates), synonyms=synonyms, squash=tests.squash,
                                             view=f"{model.config.interpolation}, {model.config.image_size}"))


def chance(tests):
    """What a model that knows nothing scores."""
    if tests.metric == "roc_auc":
        return 0.5
    return tests.targets.float().mean().item() if tests.targets.ndim > 1 else 1 / len(tests.names)


def about(tests):
    """What was counted, for results.json."""
    return dict(set=tests.name, place=str(tests.place.resolve()), pictures=len(tests.pictures),
                classes=len(tests.names))


def retrieval(model, tokenizer, folder):
    """Image-text retrieval on the test split of a Karpathy json."""
    paths, texts, owners = data.karpathy(folder)
    recall = recall_of_features(encode_unit(model, paths), encode_texts(model, tokenizer, texts), owners)
    return dict(scores={f"{way} R@{k}": r for way, row in recall.items() for k, r in row.items()},
                chance=1 / len(paths), over=f"{len(paths):,} pictures, {len(texts):,} texts",
                protocol=dict(place=str(folder), pictures=len(paths), texts=len(texts), split="test"))


def dense(model, tokenizer, tests):
    """Patch-word segmentation: each pixel goes to the class whose words are nearest to its patch.

    tests: a data.SegmentationSet, or the folder of one.
    """
    tests = tests if isinstance(tests, data.SegmentationSet) else data.segmentation_set(tests)
    classifier = zeroshot_classifier(model, tokenizer, tests.names, data.templates_of(tests.place))
    features = F.normalize(encode_pictures(model.encode_patches, tests.pictures, model), dim=2)    # (n, N, E)
    side, size = model.config.grid, model.config.image_size
    confusion = torch.zeros(len(tests.names), len(tests.names), dtype=torch.long)
    for i, rows in enumerate(features):
        label = data.center_crop(tests.label(i), size, Image.NEAREST)                                # (size, size)
        maps = (rows @ classifier.T).T.reshape(1, -1, side, side)                                    # (1, C, g, g)
        guess = F.interpolate(maps, (size, size), mode="bilinear")[0].argmax(0)                      # (size, size)
        confusion += confusion_matrix(guess, torch.from_numpy(np.array(label)), len(tests.names))
    return dict(scores=segmentation_scores(confusion), chance=1 / (2 * len(tests.names) - 1),
                over=f"{len(features):,} pictures, {len(tests.names)} classes",
                protocol=dict(place=str(tests.place), pictures=len(features), classes=len(tests.names)))


def confusion_matrix(guess, label, classes):
    """Pixels by label and guess, (C, C).  guess, label of one shape, 0 .. C - 1; labels above are left out."""
    seen = label < classes
    pairs = label[seen].long() * classes + guess[seen].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def segmentation_scores(confusion):
    """-> {"mIoU", "pixel accuracy"}, shares"""
    return {"mIoU": mean_iou(confusion), "pixel accuracy": (confusion.trace() / confusion.sum()).item()}


def mean_iou(confusion):
    """Mean over the classes that occur, as label or guess, of intersection / union.  confusion (C, C) [label, guess]"""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return (confusion.diag()[union > 0] / union[union > 0]).mean().item()


FEATURES = {"cls": lambda x: x[:, 0], "patches": lambda x: x[:, 1:].mean(1),
            "both": lambda x: torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)}  # of visual's (B, 1 + N, D): not projected


def _stamp(pictures, targets=()):
    """What changes when one of the pictures does: their places, sizes and times, or their pixels; or one label."""
    digest, files = hashlib.sha256(np.asarray(targets).tobytes()), {}
    for picture in pictures:
        if isinstance(picture, np.ndarray):
            digest.update(picture.tobytes())
            continue
        file, name = picture if isinstance(picture, tuple) else (picture, "")
        if file not in files or not name:
            stat = os.stat(file)
            files = {file: (os.path.abspath(file), stat.st_size, stat.st_mtime_ns)}
        digest.update(repr((files[file], name)).encode())
    return digest.hexdigest()


def probe_sets(name, root=""):
    """The two sets of a linear probe, by data.test_set.  Raises ValueError where their classes differ."""
    train, tests = (data.test_set(name, root, split) for split in ("train", "test"))
    if train.names != tests.names:
        odd = sorted({one[0] for one in train.names} ^ {one[0] for one in tests.names})
        raise ValueError(f"{train.place} and {tests.place} hold different classes: {', '.join(odd[:5])}")
    return train, tests


def linear(model, sets, cache=NO_CACHE, features="cls"):
    """Linear probe in CLIP's way: logistic regression by L-BFGS on frozen features, without augmentation.

    sets: the training and the test set (probe_sets).  The penalty is the best on every fifth training picture (by
    class), found as CLIP does: seven from 1e-6 to 1e6, then the interval around the best halved down to an eighth of a
    decade.  Then the whole training set is fitted.
    """
    train, tests = sets

    def encoded(part):
        made_of = cache.path and on_first_rank(lambda: _stamp(part.pictures))  # other ranks may have other times
        return cache("features", (features, part.squash, made_of), lambda: encode_pictures(
            lambda images: FEATURES[features](model.visual(images)), part.pictures, model,
            evaluation_view(model.config, part.squash)))
    x, x_test = encoded(train), encoded(tests)
    metric = METRICS[tests.metric or "accuracy"]
    scores, penalty = on_first_rank(lambda: _fitted(x, train.targets, x_test, len(train.names), metric, _device(model)))
    return dict(scores={tests.metric or "top-1": metric(scores, tests.targets)}, chance=chance(tests),
                over=f"{len(x_test):,} pictures of {len(tests.names):,} classes, {len(x):,} to train",
                remarks=train.remarks + tests.remarks, protocol=about(tests) | dict(
                    recipe="clip", features=features, penalty=penalty, training_pictures=len(x),
                    view=f"{model.config.interpolation}, {model.config.image_size}"))


def _fitted(x, y, x_test, classes, metric, device):
    """-> class scores of x_test, and the penalty that was chosen."""
    def fitted(x, y, exponent, rows):
        logits = logistic_regression(x, y, classes, 10 ** exponent)(rows).double()
        return logits.softmax(1) if y.ndim == 1 else logits
    held_out = torch.zeros(len(x), dtype=torch.bool)
    held_out[(y if y.ndim == 1 else torch.zeros(len(y))).argsort(stable=True)[::5]] = True
    if (~held_out).sum() < 2:
        raise ValueError(f"{len(x)} training pictures are too few for a linear probe")
    x, tried, step, ask = x.to(device), {}, 2.0, [float(k) for k in range(-6, 7, 2)]
    with tqdm(total=15, desc="penalties", disable=quiet(), leave=False) as bar:
        while step >= 1 / 8:
            for exponent in ask:
                if abs(exponent) <= 6:
                    tried[exponent] = metric(fitted(x[~held_out], y[~held_out], exponent, x[held_out]), y[held_out])
                    if math.isnan(tried[exponent]):
                        raise ValueError(f"the score of a penalty cannot be told from the {int(held_out.sum())} "
                                         "training pictures that are held out: too few, or of one class")
                bar.update()
            best, step = max(tried, key=tried.get), step / 2
            ask = [best - step, best + step]
    return fitted(x, y, best, x_test), 10 ** best


def logistic_regression(x, y, classes, penalty):
    """Minimise the SUM of cross-entropies + penalty / 2 * |W|^2 (scikit-learn's C = 1 / penalty) by L-BFGS.

    x (n, D), y (n,), or (n, C) of 0 and 1 for one regression per class -> function (m, D) -> logits (m, C) on the CPU.
    The steps are taken on features of mean 0 and deviation 1, where they are few; the minimum is that of the raw ones.
    """
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y, size = (x - mean) / std, y.to(x.device), 2 ** 28 // classes  # rows at a time, whose logits take 1 GiB
    weight = torch.zeros(x.size(1), classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-6,  # 1000: CLIP
                                  tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = 0
        for rows, labels in zip(x.split(size), y.split(size), strict=True):
            logits = rows @ weight + bias
            loss = (F.cross_entropy(logits, labels, reduction="sum") if y.ndim == 1 else
                    F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")) / len(x)
            loss.backward()
            total += loss.detach()
        loss = penalty / 2 / len(x) * (weight / std[:, None]).square().sum()
        loss.backward()
        return total + loss.detach()
    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return lambda rows: ((rows.to(x.device) - mean) / std @ weight + bias).cpu()


class _Crops(torch.utils.data.Dataset):
    """Random crops and mirrors of pictures, (epoch, index) -> pixels, label: as the seed of both says."""

    def __init__(self, tests, size):
        self.tests, self.size = tests, size

    def __getitem__(self, key):
        rng = np.random.default_rng(key)
        image = data.load_picture(self.tests.pictures[key[1]])
        image = data.crop(image, data.crop_box(*image.size, (0.08, 1.0), rng), self.size)
        image = ImageOps.mirror(image) if rng.random() < 0.5 else image
        return torch.from_numpy(np.array(image)), self.tests.targets[key[1]]


def linear_mocov3(model, sets, cache=NO_CACHE, features="cls", epochs=90, batch_size=1024, lr=None):
    """Linear probe by MoCo v3's recipe, the paper family's: SGD on random crops and mirrors; any number of ranks.

    Batch 1024, lr 3 x batch / 256, momentum 0.9, no weight decay, 90 epochs, cosine by epoch, head N(0, 0.01); tested
    with the shorter side at 256 / 224, cropped; all resizing bilinear.  After each epoch the head is kept beside the
    checkpoint, and the same command goes on from there.
    """
    train, tests = sets
    if train.targets.ndim > 1:
        raise ValueError(f"{train.place}: pictures of several classes are for --protocol clip")
    (rank, world), device, classes = ranks(), _device(model), len(train.names)
    batch_size = min(batch_size, len(train.pictures) // world * world)
    if batch_size == 0 or batch_size % world:
        raise ValueError(f"a batch of {batch_size} pictures cannot be shared by {world} ranks")
    lr, size = 3 * batch_size / 256 if lr is None else lr, model.config.image_size
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(model.config.width * (2 if features == "both" else 1), classes)
    torch.nn.init.normal_(head.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(head.bias)
    head.to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    made_of = cache.path and on_first_rank(lambda: _stamp(train.pictures, train.targets))
    key = ("mocov3", features, epochs, batch_size, lr, classes, made_of)
    first = 0
    if state := cache.read("head", key):
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    workers = loader_processes(len(train.pictures))
    for epoch in range(first, epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        order = torch.randperm(len(train.pictures), generator=torch.Generator().manual_seed(epoch)).tolist()
        batches = [[(epoch, i) for i in order[start + rank:start + batch_size:world]]
                   for start in range(0, len(order) - batch_size + 1, batch_size)]
        loader = torch.utils.data.DataLoader(_Crops(train, size), batch_sampler=batches,
                                             num_workers=workers, worker_init_fn=data.ignore_ctrl_c)
        for pixels, labels in tqdm(loader, f"epoch {epoch + 1} of {epochs}", leave=False,
                                   disable=quiet()):
            with torch.no_grad():
                x = FEATURES[features](model.visual(data.normalize(pixels.to(device)))).float()
            loss = F.cross_entropy(head(x), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            for p in head.parameters() if world > 1 else ():
                total = p.grad.cpu()  # equal shares: the mean over ranks is that of the batch
                dist.all_reduce(total)
                p.grad.copy_(total / world)
            optimizer.step()
        cache.write("head", key, dict(head=head.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch + 1))
    view = partial(data.center_crop, size=size, resample=Image.BILINEAR, short=size * 256 // 224)
    scores = encode_pictures(lambda images: head(FEATURES[features](model.visual(images))), tests.pictures, model, view)
    metric = METRICS[tests.metric or "accuracy"]
    return dict(scores={tests.metric or "top-1": metric(scores.double().softmax(1), tests.targets)},
                chance=chance(tests),
                over=f"{len(scores):,} pictures of {classes:,} classes, {len(train.pictures):,} to train",
                remarks=train.remarks + tests.remarks, protocol=about(tests) | dict(
                    recipe="mocov3", features=features, epochs=epochs, batch_size=batch_size, lr=lr,
                    training_pictures=len(train.pictures), view=f"bilinear, {size * 256 // 224}, {size}"))


# ---------------------------------------------------------------- pictures

# Words that name no thing in a picture.
SMALL_WORDS = set("a an the and or of in on at to with by is are there left right above below picture".split())
SHOWN = 12  # pictures of a folder in one sheet: our choice, what a screen or two can hold


def things(caption):
    """The words of a caption that may name something in a picture, each once."""
    words = dict.fromkeys(word.strip(".,;:!?\"'") for word in caption.lower().split())
    return [word for word in words if word and word not in SMALL_WORDS]


def heatmap(model, tokenizer, image, caption, path, side=224):
    """Write a PNG: the picture, and for each word of the caption where in the picture it is."""
    pictures.save(heat_sheet(caption, heat_rows(model, tokenizer, image, caption, side)), path)


def heat_sheet(title, rows):
    """Rows of `heat_rows` under a title, above the colour scale."""
    return pictures.sheet(title, rows, pictures.colour_scale("relative similarity: lowest", "highest"))


@torch.no_grad()
def heat_rows(model, tokenizer, image, caption, side=224, name="picture", columns=7):
    """A picture and a map for each word of a caption, `side` pixels each.  -> rows of pictures.sheet

    A map is the similarity of each patch to the word, less the word's mean over the picture (where is it?) and the
    patch's mean over the words (which is it?), where there are more than two.
    """
    words = things(caption)
    if not words:
        raise ValueError(f"--heatmap: the caption {caption!r} has no word to look for")
    classifier = zeroshot_classifier(model, tokenizer, words, ("{}", "a {}"), alone=True)                # (words, E)
    patches = F.normalize(model.encode_patches(_pixels(model, [image])).float().cpu()[0], dim=1)         # (N, E)
    maps = classifier @ patches.T                                                                        # (words, N)
    if len(words) > 2:  # of two words, each map would be the other's negative
        maps = maps - maps.mean(0)
    maps = (maps - maps.mean(1, keepdim=True)).view(-1, model.config.grid, model.config.grid).numpy()
    return pictures.word_rows(name, data.center_crop(image, side), words, maps, columns)


def _pixels(model, images):
    """PIL pictures as the model sees them, (n, 3, H, W) normalised on its device."""
    view = evaluation_view(model.config)
    return data.normalize(torch.from_numpy(np.stack([np.array(view(image)) for image in images])).to(_device(model)))


def mask_sheet(named, config, training, side=224):
    """What the masks of training hide.  named: [(name, PIL picture)]; training: settings of the run, {} if unknown."""
    ratio, grid = training.get("mask_ratio", 0.75), (config.grid, config.grid)
    side, rows = side // config.grid * config.grid or config.grid, []
    for i, (name, image) in enumerate(named):
        masks = dict(block=data.block_mask(grid, ratio, np.random.default_rng(i)).reshape(grid),
                     random=data.random_mask(config.grid ** 2, ratio, np.random.default_rng(i)).reshape(grid))
        rows.append(pictures.mask_row(name, data.center_crop(image, side), masks, training.get("mask", "block")))
    masks = "mask" in training and "mask" in models.METHODS[config.method].needs
    trained = f"; this run trains with {training['mask']} masks" if masks else ""
    return pictures.sheet(f"Masks of {100 * ratio:.0f} % of {config.grid} x {config.grid} patches{trained}", rows)


@torch.no_grad()
def codeword_sheet(model, named, side=224):
    """The student's most likely codeword of each patch.  named: [(name, PIL picture)].  ValueError: not MaskCLIP's."""
    if model.config.method != "maskclip":
        raise ValueError(f"--codewords needs a MaskCLIP checkpoint: {model.config.method} has no codewords")
    grid = model.config.grid
    x = model.visual(_pixels(model, [image for _, image in named]))[:, 1:]                               # (n, N, D)
    ids = model.codewords(x).argmax(-1).view(-1, grid, grid).cpu().numpy()
    side = side // grid * grid or grid
    return pictures.codeword_sheet([(name, data.center_crop(image, side)) for name, image in named], ids,
                                   model.config.codewords, columns=min(3, len(named)))


def evenly(count, n):
    """At most n of the numbers below count, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, n)})


def neighbour_sheet(model, tokenizer, folder, side=184, queries=6, k=5):
    """The nearest pictures of a few texts of a retrieval set, and the nearest texts of a few pictures."""
    paths, texts, owners = data.karpathy(folder)
    images, sentences = encode_unit(model, paths), encode_texts(model, tokenizer, texts)
    owners = torch.tensor(owners)
    of_picture = _own_texts(owners, len(paths))

    def thumb(i):
        return data.center_crop(data.load_picture(paths[i]), side)

    def found(kind, number, own, similarity, show):
        """similarity (n,) to all, own (few,): the right ones.  -> a row of pictures.neighbour_sheet"""
        ahead = int(_ahead(similarity[None], own[None])[0])
        best, order = similarity.topk(min(k, len(similarity)))
        return (f"{kind} {number + 1}: rank {ahead + 1}", texts[number] if kind == "text" else thumb(number),
                [(s, show(i), i in own.tolist()) for s, i in zip(best.tolist(), order.tolist())])
    searches = {
        f"Texts, and the {k} nearest of {len(paths):,} pictures":
            [found("text", i, owners[i:i + 1], images @ sentences[i], thumb) for i in evenly(len(texts), queries)],
        f"Pictures, and the {k} nearest of {len(texts):,} texts":
            [found("picture", i, of_picture[i], sentences @ images[i], texts.__getitem__)
             for i in evenly(len(paths), queries)]}
    return pictures.neighbour_sheet("Nearest neighbours in " + "/".join(Path(folder).resolve().parts[-2:]), searches,
                                    side)


# ---------------------------------------------------------------- the report of a run

def about_run(folder, root="data"):
    """All that pictures.report shows of the run in a folder, from last.pt, log.jsonl and results.json.

    Raises FileNotFoundError for a folder with neither checkpoint nor log, ValueError for damaged files.
    """
    run, state = read_run(folder)
    config, last = state.get("config", {}), Path(folder, "last.pt")
    try:
        run["sheets"] = run_sheets(last, config, data_names(config), root) if "tokenizer" in state else []
        for file in [last.with_name("predictions.png")] if last.with_name("predictions.png").is_file() else ():
            run["sheets"].append(("Test pictures, their labels, and what the run says.", data.load_picture(file)))
    except (OSError, ValueError) as error:  # of the test pictures: the numbers are there all the same
        run["remarks"].append(f"No pictures: {error}")
    return run


def data_names(config):
    """The data sets in the settings of a run; downstream/'s runs have one."""
    names = config.get("data", [])
    return [names] if isinstance(names, str) else names


def read_run(folder):
    """-> what `about_run` says of a run, but for the pictures; the checkpoint, {} without.  Raises what it raises."""
    folder = Path(folder)
    log, last = folder / "log.jsonl", folder / "last.pt"
    if not log.is_file() and not last.is_file():
        raise FileNotFoundError(f"{folder} is no run: it has neither last.pt nor log.jsonl")
    records = pictures.read_log(log)
    run = dict(name=folder.resolve().name, log=records, about={}, config={}, scores={}, paper={}, sheets=[], remarks=[])
    newest = last if last.is_file() else log
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime))
    if not last.is_file():
        run["about"] = dict(folder=str(folder), date=date)
        return run | dict(remarks=[f"{folder} has no last.pt yet: its log is all there is."]), {}
    state = read_checkpoint(last)
    config, made_by = state.get("config", {}), state.get("made_by", {})
    method, step = state["model_config"]["method"], state.get("step", 0)
    epoch = next((record.get("epoch", 0) for record in reversed(records) if record["step"] <= step), 0)
    run["epoch"] = epoch
    run["about"] = dict(
        folder=str(folder), method=method, model=config.get("checkpoint") or config.get("model", "-"),
        parameters=f"{sum(x.numel() for x in state['model'].values()) / 1e6:.1f} M",
        data=f"{', '.join(data_names(config))}: {state.get('pairs', '-').partition(',')[0]}", steps=f"{step:,}",
        epochs=f"{epoch:.2f} of {config.get('epochs', '-')}", date=date, **made_by)
    run["config"] = {name: " ".join(map(str, x)) if isinstance(x, list) else str(x) for name, x in config.items()}
    run["paper"] = data.prompts()["paper"].get(method, {})
    of_last = Cache(last).sha256
    for record in read_records(folder / "results.json"):
        if record.get("sha256") == of_last:  # not of an epoch before, nor of another run that was here
            counts = [f"{n:,} {what.replace('_', ' ')}" for what, n in record["protocol"].items()
                      if what in ("pictures", "classes", "texts", "training_pictures")]
            twin = run["scores"].get(record["task"], record)["protocol"]  # the same by another protocol
            other = unlike(record["protocol"], twin)
            task = record["task"] + f" ({', '.join(other)})" * bool(other)
            run["scores"][task] = record | dict(over=", ".join(counts))
    return run, state


def unlike(protocol, twin):
    """What a protocol has that another has not, in words; the place is none of it."""
    return [f"{name} {x}" for name, x in protocol.items() if twin.get(name) != x and name != "place"] + [
        f"no {name}" for name in twin if name not in protocol and name != "place"]


def run_sheets(path, config, names, root, count=3, side=160):
    """Word maps, masks and codewords of a few test pictures of the run's own data.  -> [(caption, picture)]"""
    first = str(next(iter(names), "")).partition(":")[0]
    homes = [Path(home) / first for home in (config.get("root", ""), root)] + [Path(first), Path(first).parent]
    home = next((home / "val" for home in homes if first and (home / "val/karpathy.json").is_file()), None)
    if home is None:
        return []
    (model, tokenizer), (paths, texts, owners) = load_model(path), data.karpathy(home)
    chosen = evenly(len(paths), count)
    named = [(paths[i].name, data.load_picture(paths[i])) for i in chosen]
    sheets = []
    if tokenizer:
        captions = [texts[owners.index(i)] if i in owners else "" for i in chosen]
        rows = [[caption, *heat_rows(model, tokenizer, image, caption, side, name, columns=4)]
                for (name, image), caption in zip(named, captions) if things(caption)]
        if rows:
            sheets.append(("Where the words of a caption are: each patch's similarity to each word.",
                           heat_sheet("Word maps", sum(rows, []))))
    if "mask" in models.METHODS[model.config.method].needs:
        sheets.append(("What is hidden from the student in training.", mask_sheet(named, model.config, config, side)))
    if model.config.method == "maskclip":
        sheets.append(("Patches with the same colour have the same most likely codeword; grey: less frequent ones.",
                       codeword_sheet(model, named, side)))
    return sheets


def report(folders, path, root="data"):
    """Write the report of runs, by their folders, to an HTML file.  Raises OSError, ValueError."""
    pictures.report([about_run(folder, root) for folder in folders], path)


# ---------------------------------------------------------------- runs compared

# Settings in which the runs of a row may differ: the seed, and what train.py lets differ when a run goes on.
FREE = ("seed", "root", "out", "grad_checkpointing", "workers", "log_every", "eval_every", "save_minutes", "keep",
        "resume", "force", "timeout_minutes", "steps", "micro_batch", "compile", "bad_limit")


def compare(folders):
    """The paper's table 1 for runs of train.py, as Markdown (pictures.comparison).

    Raises FileNotFoundError for a folder without last.pt, ValueError for damaged files.
    """
    tests = {}
    runs = [compared_run(Path(folder), tests) for folder in folders]
    return pictures.comparison(runs, data.prompts()["paper"], [
        f"{title} was measured at {' and '.join(places)}" for title, _, places in tests.values() if len(places) > 1])


def compared_run(folder, tests):
    """What `compare` needs of a run: settings, seed, cost, {head of a column: score}.

    tests: {what identifies a test: (short name, protocol, places)}, to which this run's are added
    """
    run, state = read_run(folder)
    if not state:
        raise FileNotFoundError(run["remarks"][0])
    file, config, step, scores, cost = folder / "log.jsonl", state.get("config", {}), state.get("step", 0), {}, {}
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    if len(run["log"]) < len(lines) - 1:  # the last may have been cut off
        raise ValueError(f"{file} is damaged in line {len(run['log']) + 1}")
    if "method" not in config:
        raise ValueError(f"{folder} is no run of train.py: --compare reads those alone")
    if log := [record for record in run["log"] if record.get("pictures_per_s") and record.get("memory_gib")]:
        second = 1 / statistics.median(record["pictures_per_s"] for record in log)
        cost = dict(epochs=run["epoch"], minutes=second * step * config.get("batch_size", 0) / 60, time=second,
                    memory=max(record["memory_gib"] for record in log))
    for record in run["scores"].values():
        title, place = test_title(record, tests), record["protocol"].get("place", record["task"])
        for name in [name for name in record["scores"] if name.endswith("R@1")] or list(record["scores"])[:1]:
            head, score = f"{title} {name}", record["scores"][name]
            scores[head if scores.get(head, score) == score else f"{head} ({place})"] = score
    left = run["epoch"] and (config.get("epochs", 0) - run["epoch"]) * step / run["epoch"]
    settings = {name: x for name, x in run["config"].items() if name not in FREE} | dict(method=run["about"]["method"])
    return dict(folder=folder, settings=settings, seed=config.get("seed"), scores=scores, cost=cost, left=left,
                pairs=state.get("pairs"),
                commit=re.sub("(?<=^[0-9a-f]{7})[0-9a-f]+", "", run["about"].get("commit") or "unknown"))


def test_title(record, tests):
    """A short name for the test of a record: one for one protocol, wherever the pictures lay."""
    kind, _, name = record["task"].partition(" ")
    unimportant = ("set", "sets", "place", "penalty")  # where it lay; what was fitted
    protocol = {name: x for name, x in record["protocol"].items() if name not in unimportant}
    parts = [part for part in Path(name).parts if part not in ("classes", "test", "val")] or [name]  # as in train.py
    short = f"{kind} {parts[-1]}"
    key = short, json.dumps(protocol, sort_keys=True)
    if key not in tests:
        twin = next((x for (known, _), (_, x, _) in tests.items() if known == short), protocol)
        other = unlike(protocol, twin)
        tests[key] = short + f" ({', '.join(other)})" * bool(other), protocol, {}
    tests[key][2][str(record["protocol"].get("place", name))] = True
    return tests[key][0]


# ---------------------------------------------------------------- the command line

def table(columns, methods=()):
    """{checkpoint: {task: what an evaluation returned}} -> text, a line per score in per cent, a column per checkpoint.

    methods: of each checkpoint, for the paper's numbers, which get a column where there are any.
    """
    lines, remarks, tasks = [], [], {}
    for results in columns.values():
        for task, result in results.items():
            tasks.setdefault(task, {}).update(dict.fromkeys(result["scores"], result))
    paper = data.prompts()["paper"]
    papers = [paper.get(method, {}) for method in methods] or [{}] * len(columns)
    shown = [any(set(paper.get(task, {})) & set(scores) for task, scores in tasks.items()) for paper in papers]
    heads = [part for label, paper in zip(columns, shown, strict=True) for part in (label, *["paper"] * paper)]
    widths = [max(8, len(head) + 2) for head in heads]
    wide = 2 + max(map(len, tasks), default=0)
    if len(heads) > 1:
        lines.append(" " * (wide + 16) + "".join(f"{head:>{w}}" for head, w in zip(heads, widths, strict=True)))
    for task, scores in tasks.items():
        for number, (score, result) in enumerate(scores.items()):
            cells = []
            for results, paper, show in zip(columns.values(), papers, shown, strict=True):
                ours = results.get(task, {}).get("scores", {}).get(score)
                cells += ["-" if ours is None else f"{100 * ours:.1f}"]
                cells += [str(paper.get(task, {}).get(score, ""))] * show
            note = "" if number else f"chance {100 * result['chance']:.1f}; {result['over']}"
            lines.append(f"{task if not number else '':<{wide}}{score:<16}"
                         + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)) + f"   {note}")
            remarks += [f"  {task}: {remark}" for remark in result.get("remarks", ()) if not number]
    if any(shown):
        remarks.append("  paper: ViT-B/16, YFCC-15M, 25 epochs" + " (DeiT: ImageNet-1K, 300)" * ("deit" in methods))
    return "\n".join(line.rstrip() for line in lines + remarks)


def provenance():
    """What numbers come from: versions, and the commit of this code ("" outside git)."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--exclude=*",
               "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return dict(commit=commit, python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__,
                pillow=PIL.__version__)


def read_records(path):
    """The records of a results.json, [] without.  Raises ValueError for another kind of file, which stays as it is."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text("utf-8"))
        if all(isinstance(record["scores"], dict) for record in records):
            return records
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} was not written by evaluate.py: move it away, so that it is not overwritten")


class Records:
    """results.json beside a checkpoint: a list of all that was measured there, one record per task and protocol."""

    def __init__(self, cache, model):
        self.path = cache.path.parent / "results.json"
        self.about = dict(checkpoint=cache.path.name, sha256=cache.sha256, model=dataclasses.asdict(model.config),
                          model_remarks=list(getattr(model, "remarks", ())))
        read_records(self.path)  # told now, not after hours

    def add(self, task, result):
        """Replaces the record of the same weights, model, task and protocol."""
        record = self.about | dict(task=task, **{name: result.get(name) for name in ("scores", "chance", "protocol",
                                                                                     "remarks")})
        record = json.loads(json.dumps(record | dict(date=time.strftime("%Y-%m-%d %H:%M:%S"), **provenance())))
        same = ("sha256", "model", "task", "protocol")
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # another evaluation may be adding its own
            kept = [old for old in read_records(self.path) if any(old.get(name) != record[name] for name in same)]
            write_atomically(self.path, (json.dumps([*kept, record], indent=1) + "\n").encode())
        except OSError as error:
            print(f"warning: {self.path} not written: {error}", file=sys.stderr)
        finally:
            os.close(folder)


def find(name, root, part):
    """A test set: the path NAME, or ROOT/NAME/`part` or ROOT/NAME (the demo is drawn).  Raises FileNotFoundError."""
    if name == "demo":
        data.draw_demo(Path(root) / "demo")
    tried = [Path(root) / name / part, Path(root) / name, Path(name)]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no test set '{name}': looked for the folders {', '.join(map(str, tried))} "
                            "(--root or $MASKCLIP_DATA name another place)")


# flag -> (its part of the folder of test sets beside train/, the function of model, tokenizer and that folder)
EVALUATIONS = dict(zeroshot=("classes/test", zeroshot), retrieval=("val", retrieval), dense=("dense", dense),
                   linear=("classes", lambda model, tokenizer, folder: linear(model, probe_sets(folder))))


def tasks(args):
    """What the command line asks for: flag, name, whether it is one of ICinW's, what loads it, what evaluates that."""
    known = data.protocols()

    def load(name):
        tests = data.test_set(name, args.root, names=args.names)
        if tests.name == "imagenet" and args.templates == 7:
            tests = dataclasses.replace(tests, templates=known["imagenet"]["templates7"])
        return tests

    def probe(model, tokenizer, sets, cache):
        if args.protocol == "mocov3":
            return linear_mocov3(model, sets, cache, args.features, args.epochs or 90, args.batch_size or 1024, args.lr)
        return linear(model, sets, cache, args.features)
    for name in args.zeroshot or ():
        for one in [name for name in known if name != "imagenet"] if name == "icinw" else [name]:
            yield "zeroshot", one, name == "icinw", partial(load, one), partial(zeroshot, synonyms=args.synonyms)
    for flag, load_set, function in (("retrieval", partial(find, root=args.root, part="val"), retrieval),
                                     ("dense", partial(data.segmentation_set, root=args.root), dense)):
        for name in getattr(args, flag) or ():
            yield (flag, name, False, partial(load_set, name),
                   lambda model, tokenizer, tests, cache, function=function: function(model, tokenizer, tests))
    for name in args.linear or ():
        yield "linear", name, False, partial(probe_sets, name, args.root), probe


def icinw(results):
    """The mean over the data sets of ICinW that were there, as a result of its own."""
    scores, count = [next(iter(result["scores"].values())) for result in results], len(data.protocols()) - 1
    name = f"mean of {count}" if len(scores) == count else "partial mean"
    return dict(scores={name: sum(scores) / len(scores)}, chance=sum(r["chance"] for r in results) / len(results),
                over=f"{len(scores)} of {count} data sets", protocol=dict(sets=[r["protocol"] for r in results]))


def measure(path, args, columns, missing, failed):
    """All that is asked for, on one checkpoint: columns[path] = its method, {task: result}; what is not there: missing.

    Of several ranks, one that fails in an evaluation ends the job: the others may be in the middle of it.
    """
    cache, (model, tokenizer) = together(lambda: (Cache(path), load_model(path)))
    records, results, twenty = together(lambda: Records(cache, model)), {}, []
    columns[str(path)] = model.config.method, results
    model.to(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")
    if ranks()[0] == 0:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{path}: {model.config.method}, {size:.1f} M parameters, {model.config.image_size} pixels",
              *model.remarks, sep="\n  ")

    def keep(task, result):
        results[task] = result
        if ranks()[0] == 0:
            records.add(task, result)
    for flag, name, of_icinw, load, evaluate in tasks(args):
        try:
            if tokenizer is None and flag != "linear":
                raise ValueError(f"--{flag} needs a text encoder, and {path} ({model.config.method}) has none: use "
                                 "--linear")
            tests = together(load)
        except (OSError, ValueError) as error:  # of all ranks
            if of_icinw and isinstance(error, FileNotFoundError):
                missing[name] = error
            else:
                failed.append(f"{name}: {error}")
            continue
        try:
            result = evaluate(model, tokenizer, tests, cache)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a GPU's memory is full
            failed.append(f"{name}: {str(error).strip().splitlines()[-1]}")
            if ranks()[1] > 1:
                raise
            continue
        keep(f"{flag} {result['protocol'].get('set', name)}", result)
        twenty += [result] * of_icinw
    if twenty:
        keep("zeroshot icinw", icinw(twenty))


def run(args):
    """What the command line asks for.  Raises ValueError at the end for what could not be evaluated."""
    columns, missing, failed = {}, {}, []
    for path in dict.fromkeys(args.checkpoint or [newest_checkpoint()]):
        try:
            measure(path, args, columns, missing, failed)
        except (OSError, ValueError, RuntimeError) as error:
            if str(path) in columns:  # an evaluation of several ranks
                break
            failed.append(str(error))
    measured = any(results for _, results in columns.values())
    if ranks()[0] == 0:
        if measured:
            print(table({path: results for path, (_, results) in columns.items()},
                        [method for method, _ in columns.values()]))
        for name, error in missing.items():
            homes = data.homes(name, args.root)
            print(f"missing: {name}:", error if any(home.is_dir() for home in homes) else ", ".join(map(str, homes)))
    if missing and not measured:
        failed.append(f"none of ICinW's data sets is under {args.root}")
    if failed:
        raise ValueError("; ".join(dict.fromkeys(failed)))


SHEETS = ("heatmap", "masks", "neighbours", "codewords")  # flags that draw a picture


def draw(args, flag):
    """One of SHEETS, of one checkpoint."""
    path, asked = args.checkpoint[0] if args.checkpoint else newest_checkpoint(), getattr(args, flag)
    output = args.output or f"{flag}.png"
    if flag == "masks":
        state = _load(path)
        ours = "model_config" in state
        config = models.ModelConfig(**state["model_config"]) if ours else read_weights(path)["config"]
        sheet = mask_sheet(named_pictures(asked), config, state.get("config", {}) if ours else {})
    else:
        model, tokenizer = load_model(path)
        if flag != "codewords" and tokenizer is None:
            raise ValueError(f"--{flag} needs a text encoder, and {path} ({model.config.method}) has none")
        if flag == "codewords":
            sheet = codeword_sheet(model, named_pictures(asked))
        elif flag == "neighbours":
            sheet = neighbour_sheet(model, tokenizer, find(asked, args.root, "val"))
        else:
            place, caption = asked
            files = data.picture_files(place) if Path(place).is_dir() else [place]
            if not files:
                raise ValueError(f"--heatmap: no pictures in the folder {place}")
            title = caption if len(files) <= SHOWN else f"{caption} (the first {SHOWN} of {len(files)} pictures)"
            sheet = heat_sheet(title, sum((heat_rows(model, tokenizer, image, caption, name=name)
                                           for name, image in named_pictures(files[:SHOWN])), []))
    pictures.save(sheet, output)
    print(f"wrote {output}")


def named_pictures(paths):
    """-> [(name, PIL picture)].  Raises ValueError that names the first which cannot be read."""
    return [(Path(path).name, data.load_picture(path)) for path in paths]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", nargs="+", help=f"{FORMATS}; several get a column "
                        "each; else the newest under runs/")
    parser.add_argument("--root", default=os.environ.get("MASKCLIP_DATA", "data"), help="where named sets lie")
    parser.add_argument("--zeroshot", nargs="+", metavar="NAME|PATH", help="imagenet, one of ICinW's twenty, icinw for "
                        "all of them, or a folder with one folder of pictures a class")
    parser.add_argument("--templates", type=int, choices=(80, 7), default=80, help="for ImageNet: CLIP's or SLIP's")
    parser.add_argument("--synonyms", action="store_true", help="all names of a class (SLIP), not the first (ELEVATER)")
    parser.add_argument("--names", metavar="FILE", help="lines FOLDER<tab>NAME for class folders of your own")
    parser.add_argument("--retrieval", nargs="+", metavar="NAME|PATH", help="flickr30k, coco, or a folder with "
                        "karpathy.json or dataset*.json and its pictures")
    parser.add_argument("--dense", nargs="+", metavar="NAME|PATH", help="ade20k, or a folder with images/, "
                        "labels/, classes.txt")
    parser.add_argument("--linear", nargs="+", metavar="NAME|PATH", help="imagenet, one of ICinW's, or a folder with "
                        "train/ and test/ class folders")
    parser.add_argument("--features", choices=FEATURES, default="cls", help="--linear: the class token, the "
                        "mean of the patches, or both")
    parser.add_argument("--protocol", choices=("clip", "mocov3"), default="clip", help="--linear: logistic "
                        "regression by L-BFGS on fixed features, or SGD with crops and mirrors")
    parser.add_argument("--epochs", type=int, help="--protocol mocov3 (default: 90)")
    parser.add_argument("--batch-size", type=int, help="--protocol mocov3: of all ranks together (default: 1024)")
    parser.add_argument("--lr", type=float, help="--protocol mocov3 (default: 3 x batch / 256)")
    parser.add_argument("--heatmap", nargs=2, metavar=("IMAGE", "CAPTION"), help="draw where each word is in a picture,"
                        f" or in the first {SHOWN} of a folder")
    parser.add_argument("--masks", nargs="+", metavar="IMAGE", help="draw what is hidden from the student")
    parser.add_argument("--neighbours", metavar="NAME|PATH", help="draw what is nearest to some texts and pictures "
                        "of a set for --retrieval")
    parser.add_argument("--codewords", nargs="+", metavar="IMAGE", help="draw each patch's most likely codeword")
    parser.add_argument("--report", nargs="+", metavar="RUN", help="write an HTML page on a run, or comparing several")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="print the paper's table of runs: those "
                        "that differ in seed alone share a row")
    parser.add_argument("--output", help="where one of --heatmap, --masks, --neighbours, --codewords, --report writes "
                        "(default: its name with .png; RUN/report.html, of several runs ./report.html)")
    args = parser.parse_args()
    flags = ("zeroshot", "retrieval", "dense", "linear", *SHEETS, "report", "compare")
    asked = [flag for flag in flags if getattr(args, flag)]
    drawn = [flag for flag in asked if flag in (*SHEETS, "report")]
    if not asked:
        parser.error(f"nothing to do: give one of --{', --'.join(flags)}")
    if args.compare and (len(asked) > 1 or args.checkpoint or args.output):
        parser.error("--compare takes folders of runs and prints a table: give no other task, --checkpoint or --output")
    if args.output and len(drawn) > 1:
        parser.error("--output names one file: give one of " + ", ".join(f"--{flag}" for flag in drawn))
    for name, ready, what in (("templates", args.zeroshot, "--zeroshot"), ("synonyms", args.zeroshot, "--zeroshot"),
                              ("names", args.zeroshot, "--zeroshot"), ("features", args.linear, "--linear"),
                              ("protocol", args.linear, "--linear"), ("output", drawn, "pictures and reports"),
                              *((name, args.protocol == "mocov3", "--protocol mocov3")
                                for name in ("epochs", "batch_size", "lr"))):
        given = getattr(args, name) != parser.get_default(name)
        if given and not ready:
            parser.error(f"--{name.replace('_', '-')} is for {what}")
        if given and name in ("epochs", "batch_size", "lr") and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    if args.templates == 7 and "imagenet" not in map(data.known_name, args.zeroshot):
        parser.error("--templates 7 is for --zeroshot imagenet")
    for flag in drawn:
        if flag != "report" and len(args.checkpoint or ()) > 1:
            parser.error(f"--{flag} draws one checkpoint's picture")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 (ELEVATER, SLIP)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # the ranks meet between the long parts only; gloo, for all that they exchange lies on the CPU
            dist.init_process_group("gloo", timeout=timedelta(days=2))
        if args.zeroshot or args.retrieval or args.dense or args.linear:
            run(args)
        if args.compare and ranks()[0] == 0:
            print(compare(args.compare))
        for flag in drawn if ranks()[0] == 0 else ():
            if flag == "report":
                one = Path(args.report[0], "report.html") if len(args.report) == 1 else Path("report.html")
                report(args.report, args.output or one, args.root)
                print(f"wrote {args.output or one}")
            else:
                draw(args, flag)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: error: {str(error).splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted; what was finished stands in results.json beside the checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
