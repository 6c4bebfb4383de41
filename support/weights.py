"""Weights of other projects in our names, and our own checkpoints; no code in a file is run.

Kinds, told apart by the names of their tensors: ours; OpenAI's CLIP; open_clip's, whose image tower
may be timm's; SLIP's; Hugging Face's CLIPModel; ViTs of timm, MAE and BEiT.

    weights = read_weights("ViT-B-16.pt")    # or a folder from Hugging Face's or open_clip's hub
    weights["model"], weights["config"]      # evaluate.load_model makes a model of them
"""
import dataclasses
import io
import json
import math
import pickle
import zipfile
from pathlib import Path

import torch
from PIL import Image

from data import IMAGENET_MEAN, IMAGENET_STD
from model import ModelConfig
from support.checkpoints import DAMAGED, load_checkpoint
from support.runtime import sentence_of
from tokenizer import FIXED

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # CLIP, pixels from 0 to 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("our checkpoints; OpenAI's CLIP, open_clip's and SLIP's weights; Hugging Face's "
           "CLIPModel; timm's, MAE's and BEiT's ViTs with a class token and absolute positions")
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
         "open_clip_pytorch_model.bin")
SETTINGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
HEADS = {1280: 16}  # of ViT-H (open_clip, MAE); in all others a head has 64 columns


# ---------------------------------------------------------------- files -> dicts of tensors

def weights_file(path):
    """`path`, or the file of weights in the folder `path`.  FileNotFoundError if it has none."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} is a folder without {', '.join(FILES)}")


def _read_file(path):
    """A file of weights as a dict.  Raises an OSError of the file itself, else ValueError."""
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ValueError(f"{path} needs a package: pip install safetensors") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a checkpoint, or is damaged ({error})") from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("/constants.pkl"):  # torch.save writes none
                        program = _ScriptReader(archive, name.partition("/")[0]).load()
                        return dict(_script_tensors(program), torchscript=True)
    except DAMAGED as error:
        what = "would run code" if "asks for" in str(error) else "is no checkpoint, or is damaged"
        raise ValueError(f"{path} {what} ({sentence_of(error)})") from error
    return load_checkpoint(path)


class _ScriptReader(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive, as OpenAI's downloads are, without its program.

    By hand, because torch.jit.load trusts its file.
    """

    class Module:
        """Stands for every class of the program; its state becomes its attributes."""

    STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16,
                "LongStorage": torch.int64}
    FUNCTIONS = {"torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_:
                 storage.as_strided(size, stride, offset),
                 "torch.jit._pickle.build_intlist": list, "collections.OrderedDict": dict}

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive = archive
        self.folder = folder

    def find_class(self, module, name):
        """Modules and tensors; UnpicklingError for all else."""
        if module.startswith("__torch__"):
            return self.Module
        if module == "torch" and name in self.STORAGES:
            return self.STORAGES[name]
        if f"{module}.{name}" in self.FUNCTIONS:
            return self.FUNCTIONS[f"{module}.{name}"]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, key):
        """A storage: ("storage", kind, name, device, count) -> 1-d tensor"""
        content = self.archive.read(f"{self.folder}/data/{key[2]}")
        return torch.frombuffer(bytearray(content), dtype=key[1])


def _script_tensors(module, prefix=""):
    """(dotted name, tensor) of a program's module and of those in it."""
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _ScriptReader.Module):
            yield from _script_tensors(value, f"{prefix}{name}.")


# ---------------------------------------------------------------- kinds of weights

def read_weights(path):
    """Weights of any of the FORMATS in our names.

    -> {"model": {name: tensor}, "config": ModelConfig, "notes": [str]}, and "tokenizer", a list of
    merges as "left right", if the file or its folder holds them.  config.method names the kind:
    "slip", "simclr", "mae" and "vit" come without heads and decoders.  If pixels are normalised in
    another way than ours, that is folded into the patch embedding.  Raises FileNotFoundError, or
    ValueError for all else.
    """
    file = weights_file(path)
    state = _read_file(file)
    tensors = _tensors(state)
    try:
        settings = {name: state[name] for name in ("architecture", "model_args", "pretrained_cfg")
                    if name in state}
        if file.name in FILES:  # of a hub, with settings and merges next to it
            for name in SETTINGS:
                if file.with_name(name).is_file():
                    settings |= json.loads(file.with_name(name).read_bytes())
            if file.with_name("merges.txt").is_file():
                text = file.with_name("merges.txt").read_text("utf-8")
                settings["merges"] = text.strip().split("\n")[1:]
        weights = _recognise(state, tensors, settings)
    except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is of a supported kind, but it or a file next to it does not fit "
                         f"({type(error).__name__}: {sentence_of(error)[:200]})") from error
    if weights is None:
        names = ", ".join(list(tensors)[:4]) or "none"
        raise ValueError(f"{path} holds no weights that are supported ({FORMATS}); its first "
                         f"tensors are {names}")
    return weights


def take_weights(model, weights, label):
    """Load what read_weights gave into a model, as far as it goes.  -> what was and was not taken

    label: what messages call the weights.  Raises ValueError if a shape or the depth differs.
    """
    state = model.state_dict()
    taken = {name: x for name, x in weights["model"].items() if name in state}
    wrong = [f"{name} {list(x.shape)}, here {list(state[name].shape)}" for name, x in taken.items()
             if x.shape != state[name].shape]
    if weights["config"].depth != model.config.depth:
        wrong.append(f"an image tower of {weights['config'].depth} blocks, here "
                     f"{model.config.depth}")
    if wrong:
        raise ValueError(f"{label} does not fit the model: {'; '.join(wrong[:3])}")
    model.load_state_dict(state | taken)
    fresh = sorted({name.partition(".")[0] for name in state.keys() - taken.keys()})
    return (f"{len(taken)} of {len(state)} tensors are those of {label}; fresh: "
            f"{', '.join(fresh) or 'none'}")


def _recognise(state, tensors, settings):
    """The kind of weights by their names -> what read_weights returns, or None."""
    if {"model_config", "model"} <= state.keys():
        return _ours(state)
    names = tensors.keys()
    image = {"visual.class_embedding", "visual.trunk.norm.weight"} & names
    if image and "text_projection" in names:
        openai = "torchscript" in state or "input_resolution" in names
        return _clip(tensors, settings, openai)
    if "visual.norm.weight" in names and {"image_projection", "image_mlp.layer1.weight"} & names:
        return _slip(tensors)
    if "vision_model.embeddings.class_embedding" in names:
        return _hugging_face(tensors, settings)
    if {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "cls_token", "norm.weight"} <= names:
        return _timm(tensors, settings)
    return None


def _tensors(state):
    """The tensors of a dict of weights, or of the one that a training script put into it."""
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    return {str(name).removeprefix("module."): x for name, x in state.items()
            if isinstance(x, torch.Tensor)}


def _ours(state):
    """A checkpoint of train.py, or of downstream/, which has no tokenizer."""
    config = ModelConfig(**state["model_config"])
    if "tokenizer" in state:
        return dict(model=dict(state["model"]), config=config, notes=[],
                    tokenizer=state["tokenizer"])
    tower = {name: x for name, x in state["model"].items() if name.startswith("visual.")}
    return dict(model=tower, config=dataclasses.replace(config, method="vit"),
                notes=["a tower that was trained further: its head is left out"])


def _rename(state, prefixes, renames):
    """Tensors whose names start with a prefix, in float32, with parts of the names replaced."""
    renamed = {}
    for name, x in state.items():
        if name.startswith(prefixes):
            for old, new in renames:
                name = name.replace(old, new)
            renamed[name] = x.float()
    return renamed


# Parts of CLIP's names -> ours.
CLIP_BLOCK = (("transformer.resblocks", "blocks"), ("ln_1", "norm1"), ("ln_2", "norm2"),
              ("c_fc", "fc1"), ("c_proj", "fc2"), ("in_proj_", "qkv."), ("out_proj", "proj"),
              ("ln_pre", "norm_pre"), ("ln_post", "norm"), ("ln_final", "norm"),
              ("conv1", "patch_embed.proj"), ("class_embedding", "cls_token"),
              ("positional_embedding", "pos_embed"))
HUGGING_FACE = (
    ("vision_model.", "visual."), ("text_model.", "text."), ("encoder.layers", "blocks"),
    ("layer_norm", "norm"), ("self_attn.out_proj", "attn.proj"), ("pre_layrnorm", "norm_pre"),
    ("post_layernorm", "norm"), ("final_norm", "norm"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.class_embedding", "cls_token"), ("visual_projection", "image_projection"))


def _clip(state, settings, openai):
    """OpenAI's CLIP and open_clip's."""
    config = settings.get("model_cfg", {})
    vision = config.get("vision_cfg", {})
    quick = openai or config.get("quick_gelu", False)
    notes = []
    if not openai and not config:  # the tensors are the same for both
        notes.append("the file does not say whether its towers have GELU or QuickGELU: GELU is "
                     "taken, as in open_clip's models without 'quickgelu' in their names")
    if "visual.trunk.cls_token" in state:
        weights = _rename(state, "visual.trunk.", [("visual.trunk.", "visual.")])
        weights["image_projection.weight"] = state["visual.head.proj.weight"].float()
        name = dict(architecture=vision.get("timm_model_name", ""))
        fields = _timm_fields(state, name | settings, quick)
    else:
        weights = _rename(state, "visual.", CLIP_BLOCK)
        weights["image_projection.weight"] = weights.pop("visual.proj").T
        fields = dict(pre_norm="visual.ln_pre.weight" in state, quick_gelu=(quick, quick),
                      image_norm_eps=1e-5)
        if "head_width" in vision:
            fields["heads"] = vision["width"] // vision["head_width"]
    fields["text_heads"] = config.get("text_cfg", {}).get("heads")
    view = dict(mean=CLIP_MEAN, std=CLIP_STD) | settings.get("preprocess_cfg", {})
    return _finish(weights | _clip_text(state), "clip", view, notes, fields, settings.get("merges"))


def _clip_text(state):
    """The text tower of OpenAI's CLIP, open_clip and SLIP."""
    prefixes = ("transformer.resblocks.", "positional_embedding", "token_embedding", "ln_final")
    tower = _rename(state, prefixes, CLIP_BLOCK)
    weights = {f"text.{name}": x for name, x in tower.items()}
    weights["text_projection.weight"] = state["text_projection"].float().T
    weights["logit_scale"] = state["logit_scale"].float()
    return weights


def _slip(state):
    """SLIP's CLIP, SLIP and SimCLR: timm's ViT, 12 heads in ViT-S, evaluated bilinearly."""
    weights = _rename(state, "visual.", ())
    method = "simclr"
    if "image_projection" in state:
        method = "slip" if "image_mlp.layer1.weight" in state else "clip"
        weights |= _clip_text(state)
        weights["image_projection.weight"] = state["image_projection"].float().T
    width = len(weights["visual.patch_embed.proj.weight"])
    view = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear")
    return _finish(weights, method, view, [], dict(heads=16 if width == 1024 else 12))


def _hugging_face(state, settings):
    """Hugging Face's CLIPModel."""
    weights = _rename(state, "", HUGGING_FACE)
    for name in list(weights):
        if name.endswith("position_ids"):
            del weights[name]
        elif ".self_attn.q_proj." in name:
            parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            weights[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    vision = settings.get("vision_config", {})
    text = settings.get("text_config", {})
    quick = tuple(tower.get("hidden_act", "quick_gelu") == "quick_gelu" for tower in (vision, text))
    fields = dict(pre_norm=True, quick_gelu=quick, heads=vision.get("num_attention_heads"),
                  image_norm_eps=vision.get("layer_norm_eps", 1e-5),
                  text_heads=text.get("num_attention_heads"))
    view = dict(mean=settings.get("image_mean", CLIP_MEAN), std=settings.get("image_std", CLIP_STD),
                interpolation=settings.get("resample"))
    notes = []
    if not settings.keys() - {"merges"}:
        notes.append("no config.json next to the file: QuickGELU, and CLIP's mean and deviation of "
                     "pixels are taken")
    return _finish(weights, "clip", view, notes, fields, settings.get("merges"))


def _timm(state, settings):
    """ViTs of timm, MAE and BEiT, without their heads and decoders."""
    for name in list(state):
        if "relative_position" in name or "gamma_" in name:
            raise ValueError(f"{name}: relative positions and layer scale are not supported")
        if name.endswith("attn.q_bias"):
            q = state.pop(name)
            v = state.pop(name.replace("q_bias", "v_bias"))
            k = torch.zeros_like(q)  # BEiT's keys have no bias
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([q, k, v])
    heads = ("head.", "fc_norm.", "decoder", "mask_token")
    weights = {f"visual.{name}": x.float() for name, x in state.items()
               if not name.startswith(heads)}
    view = settings.get("pretrained_cfg", {})
    notes = []
    if not view:
        notes.append("the file does not name the mean and deviation of its pixels: ImageNet's are "
                     "taken (MAE and DeiT have these; some of timm's have 0.5)")
    return _finish(weights, "mae" if "mask_token" in state else "vit",
                   dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) | view, notes,
                   _timm_fields(state, settings))


def _timm_fields(state, settings, quick_text=True):
    """What the shapes of timm's ViT do not say, by its config.json or else by its name."""
    name = settings.get("architecture", "")
    arguments = settings.get("model_args", {})
    act = arguments.get("act_layer", "quick_gelu" if "quickgelu" in name else "gelu")
    return dict(pre_norm=any(key.endswith("norm_pre.weight") for key in state),
                quick_gelu=(act == "quick_gelu", quick_text), heads=arguments.get("num_heads"),
                image_norm_eps=1e-5 if "_clip_" in name else 1e-6)


def _finish(weights, method, view, notes, fields, merges=None):
    """Fold the normalisation of pixels into the patch embedding, and find the shapes.

    view: mean, std, interpolation (a word, or Pillow's number); fields: of ModelConfig, those that
    the shapes do not say.  -> what read_weights returns
    """
    std = torch.tensor(view["std"])
    scale = torch.tensor(IMAGENET_STD) / std                 # their pixels are ours * scale + shift
    shift = (torch.tensor(IMAGENET_MEAN) - torch.tensor(view["mean"])) / std
    kernel = weights["visual.patch_embed.proj.weight"]       # (D, 3, p, p)
    bias = weights.get("visual.patch_embed.proj.bias", 0)
    weights["visual.patch_embed.proj.weight"] = kernel * scale[:, None, None]
    weights["visual.patch_embed.proj.bias"] = (
        bias + (kernel * shift[:, None, None]).sum((1, 2, 3)))
    width, _, patch_size, _ = kernel.shape
    for name in ("visual.cls_token", "visual.pos_embed"):
        weights[name] = weights[name].reshape(1, -1, width)
    n_patches = weights["visual.pos_embed"].size(1) - 1
    grid = math.isqrt(n_patches)
    if grid ** 2 != n_patches:
        raise ValueError(f"{n_patches + 1} positions are no square of patches and a class token")
    bilinear = view.get("interpolation") in ("bilinear", int(Image.BILINEAR))
    shapes = dict(image_size=grid * patch_size, patch_size=patch_size, width=width,
                  depth=_depth(weights, "visual"), heads=HEADS.get(width, width // 64),
                  interpolation="bilinear" if bilinear else "bicubic")
    if "text.token_embedding.weight" in weights:
        words = weights["text.token_embedding.weight"]       # (vocabulary without [MASK], D)
        n_words = 49408 if merges is None else len(merges) + FIXED - 1   # CLIP's
        if len(words) != n_words:
            raise ValueError(f"its vocabulary has {len(words)} tokens instead of {n_words}, those "
                             "of its merges.txt or else of CLIP")
        mask = words.new_zeros(1, words.size(1))
        weights["text.token_embedding.weight"] = torch.cat([words, mask])
        shapes |= dict(context_length=len(weights["text.pos_embed"]), text_width=words.size(1),
                       text_depth=_depth(weights, "text"), text_heads=words.size(1) // 64,
                       embed_dim=len(weights["text_projection.weight"]), vocab_size=n_words + 1)
    shapes |= {name: value for name, value in fields.items() if value is not None}
    result = dict(model=weights, config=ModelConfig(method=method, **shapes), notes=notes)
    return result if merges is None else dict(result, tokenizer=merges)


def _depth(weights, tower):
    """The number of blocks of a tower."""
    return sum(name.startswith(f"{tower}.blocks.") and name.endswith("norm1.weight")
               for name in weights)
