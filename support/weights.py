"""Weights of other projects in our names, and our own checkpoints; no code in a file is run.

Kinds, told apart by the names of their tensors: ours; OpenAI's CLIP; open_clip's, whose image tower
may be timm's; SLIP's; Hugging Face's CLIPModel; ViTs of timm and MAE.

    weights = read_weights("ViT-B-16.pt")    # or a folder from Hugging Face's or open_clip's hub
    weights["model"], weights["config"]      # evaluate.load_model makes a model of them
"""
import dataclasses
import hashlib
import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import IMAGENET_MEAN, IMAGENET_STD
from model import CLIP, ModelConfig, VisionModel
from support.checkpoints import DAMAGED, check_archive, load_state
from support.runtime import sentence_of
from tokenizer import FIXED

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # CLIP, pixels from 0 to 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("our checkpoints; OpenAI's CLIP, open_clip's and SLIP's weights; Hugging Face's "
           "CLIPModel; timm's and MAE's ViTs with a class token and absolute positions")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of several parts
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
         "open_clip_pytorch_model.bin", *INDICES)
# Where training scripts put weights, and what they and wrappers put before names.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "teacher",
            "student")
PREFIXES = re.compile(r"^((module|_orig_mod|model|clip_model|backbone)\.)+")
SETTINGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
# Parts of their names -> ours, replaced in this order.
NAMES = (
    # Hugging Face's
    ("vision_model.", "visual."), ("text_model.", "text."), ("encoder.layers", "blocks"),
    ("layer_norm", "norm"), ("final_norm", "norm"), ("self_attn", "attn"), ("embeddings.", ""),
    ("pre_layrnorm", "norm_pre"), ("post_layernorm", "norm"),
    ("patch_embedding", "patch_embed.proj"), ("position_embedding.weight", "pos_embed"),
    ("visual_projection", "image_projection"),
    # those of CLIP, open_clip and SLIP
    ("visual.trunk.", "visual."), ("visual.head.proj", "image_projection"),
    ("visual.proj", "image_projection"), ("transformer.resblocks", "blocks"), ("ln_1", "norm1"),
    ("ln_2", "norm2"), ("c_fc", "fc1"), ("c_proj", "fc2"), ("in_proj_", "qkv."),
    ("out_proj", "proj"), ("ln_pre", "norm_pre"), ("ln_post", "norm"), ("ln_final", "norm"),
    ("conv1", "patch_embed.proj"), ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"))
TOWER = ("patch_embed.", "cls_token", "token_embedding.", "pos_embed", "norm", "blocks.")
KEPT = ("visual.", "text.", "image_projection", "text_projection", "logit_scale")
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
    raise FileNotFoundError(f"{path} is a folder without {', '.join(FILES)}: name a file in "
                            "it, such as last.pt")


def _read_file(path):
    """A file of weights -> dict, its SHA-256.  Raises an OSError of the file itself, or ValueError.

    The file is opened once: training may replace last.pt at any moment.
    """
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        if path.suffix == ".safetensors":
            return _read_safetensors(file, path), sha256
        if path.name.endswith(INDICES):
            return _read_parts(file, path), sha256
        if not zipfile.is_zipfile(file):
            return load_state(file, path), sha256
        try:
            with zipfile.ZipFile(file) as archive:
                for folder in zipfile.Path(archive).iterdir():
                    if (folder / "constants.pkl").is_file():  # torch.save writes none
                        check_archive(file)  # load_state does it for the others
                        tensors = dict(_script_tensors(_ScriptReader(folder).load()))
                        return {"input_resolution": torch.tensor(0)} | tensors, sha256  # OpenAI's
        except DAMAGED as error:
            raise ValueError(f"{path} is no checkpoint, is damaged, or would run code "
                             f"({sentence_of(error)})") from error
        return load_state(file, path), sha256


def _read_safetensors(file, path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
        return load(file.read())
    except ImportError as error:
        raise ValueError(f"{path} needs a package: pip install safetensors") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged ({error})") from error


def _read_parts(file, path):
    """Hugging Face's weights in several files, by their index."""
    try:
        names = {Path(name).name for name in json.load(file)["weight_map"].values()}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no index of weights ({error!r})") from error
    parts = [_read_file(path.with_name(name))[0] for name in sorted(names)]
    return {name: x for part in parts for name, x in part.items()}


class _ScriptReader(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive, as OpenAI's downloads are, without its program.

    By hand, because torch.jit.load trusts its file.  folder: zipfile.Path in the archive
    """
    KNOWN = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
             "torch.LongStorage": torch.int64, "collections.OrderedDict": dict,
             "torch.jit._pickle.build_intlist": list,
             "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_:
             storage.as_strided(size, stride, offset)}

    def __init__(self, folder):
        super().__init__((folder / "data.pkl").open("rb"))
        self.folder = folder

    def find_class(self, module, name):
        """What makes tensors; a module becomes its attributes.  UnpicklingError for all else."""
        if module.startswith("__torch__"):
            return SimpleNamespace
        if f"{module}.{name}" in self.KNOWN:
            return self.KNOWN[f"{module}.{name}"]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, key):
        """A storage: ("storage", kind, name, device, count) -> 1-d tensor"""
        content = (self.folder / "data" / key[2]).read_bytes()
        return torch.frombuffer(bytearray(content), dtype=key[1])


def _script_tensors(module, prefix=""):
    """(dotted name, tensor) of a program's module and of those in it."""
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, SimpleNamespace):
            yield from _script_tensors(value, f"{prefix}{name}.")


# ---------------------------------------------------------------- weights in our names

def read_weights(path):
    """Weights of any of the FORMATS in our names.

    -> {"model": {name: tensor}, "config": ModelConfig, "notes": [str], "sha256": of the file}, and
    "tokenizer", merges as "left right", if the file or its folder holds them.  config.method names
    the kind: "slip", "simclr", "mae" and "vit" come without heads and decoders.  If pixels are
    normalised in another way than ours, that is folded into the patch embedding.  Raises
    FileNotFoundError, or ValueError for all else.
    """
    file = weights_file(path)
    state, sha256 = _read_file(file)
    tensors = _tensors(state)
    facts_of = [function for names, function in KINDS if names <= tensors.keys()]
    try:
        if {"model_config", "model"} <= state.keys():
            return _ours(state) | dict(sha256=sha256)
        if facts_of:
            settings, tokenizer = _hub_settings(file)
            if "quickgelu" in file.name.lower():  # as open_clip's names say it
                settings.setdefault("model_cfg", dict(quick_gelu=True))
            fields, view = facts_of[0](tensors, settings)
            weights, left_out = _rename(tensors)
            _fold_pixels(weights, view)
            config = _config_of(weights, fields, view, **tokenizer)
            act = "QuickGELU" if config.quick_gelu[0] else "GELU"
            note = ("the file does not say its activation, its heads, mean and deviation of its "
                    f"pixels: {act} ('quickgelu' in its name: QuickGELU), {config.heads}, "
                    f"{view['mean']} and {view['std']} are taken")
            # OpenAI's and SLIP's are all alike, the other kinds are not.
            is_sure = settings or tensors.keys() & {"input_resolution", "visual.norm.weight"}
            notes = [] if is_sure else [note]
            if left_out:
                notes.append(f"left out: {', '.join(left_out[:8])}")
            wrappers = [name for name in WRAPPERS if isinstance(state.get(name), dict)]
            if len(wrappers) > 1:
                notes.append(f"of the weights {', '.join(wrappers)} in it, {wrappers[0]} is taken")
            return dict(model=weights, config=config, notes=notes, sha256=sha256) | tokenizer
    except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is of a supported kind, but it or a file next to it does not fit "
                         f"({type(error).__name__}: {sentence_of(error)[:200]})") from error
    what = "tensors" if tensors else "keys, none of a tensor,"
    raise ValueError(f"{path} holds no weights that are supported ({FORMATS}); its first {what} "
                     f"are {', '.join(map(str, list(tensors or state)[:4])) or 'none'}")


def take_weights(model, weights, label):
    """Load what read_weights gave into a model, as far as it goes.  -> what was and was not taken

    label: what messages call the weights.  Positions of patches are interpolated if the pictures
    have another size.  Raises ValueError if another shape or the depth differs.
    """
    notes = [f"{label}: {note}" for note in weights["notes"]]
    theirs = dict(weights["model"])
    for name in ("visual.pos_embed", "image_decoder.pos_embed"):
        if name in theirs and name in model.state_dict():
            theirs[name] = resized_positions(theirs[name], model.config.grid)
    if weights["config"].grid != model.config.grid:
        notes.append(f"{label}: positions of {weights['config'].grid} x {weights['config'].grid} "
                     f"patches are interpolated to {model.config.grid} x {model.config.grid}")
    if weights["config"].depth != model.config.depth:
        raise ValueError(f"{label} does not fit the model: an image tower of "
                         f"{weights['config'].depth} blocks, here {model.config.depth}")
    try:
        missing = model.load_state_dict(theirs, strict=False).missing_keys
    except RuntimeError as error:  # another shape
        raise ValueError(f"{label} does not fit the model: {sentence_of(error)}") from error
    total = len(model.state_dict())
    fresh = ", ".join(sorted({name.partition(".")[0] for name in missing})) or "none"
    notes.append(f"{total - len(missing)} of {total} tensors are those of {label}; fresh: {fresh}")
    return "\n".join(notes)


def resized_positions(positions, side):
    """Positions (.., 1 + n * n, D) of class token and grid -> (.., 1 + side * side, D), as BEiT."""
    n = math.isqrt(positions.size(-2) - 1)
    if n == side:
        return positions
    grid = positions[..., 1:, :].reshape(1, n, n, -1).permute(0, 3, 1, 2)           # (1, D, n, n)
    grid = F.interpolate(grid.float(), (side, side), mode="bicubic")
    grid = grid.flatten(2).transpose(1, 2).to(positions)                            # (1, side^2, D)
    return torch.cat([positions[..., :1, :], grid.view(*positions.shape[:-2], side * side, -1)], -2)


def _tensors(state):
    """The tensors of a dict of weights, or of the one that a training script put into it."""
    for key in WRAPPERS:
        if isinstance(state.get(key), dict):
            state = state[key]
    return {PREFIXES.sub("", str(name)): x for name, x in state.items()
            if isinstance(x, torch.Tensor)}


def _ours(state):
    """A checkpoint of train.py, or of downstream/, which has no tokenizer."""
    config = ModelConfig(**state["model_config"])
    if "tokenizer" in state:
        return dict(model=state["model"], config=config, notes=[], tokenizer=state["tokenizer"])
    tower = {name: x for name, x in state["model"].items() if name.startswith("visual.")}
    return dict(model=tower, config=dataclasses.replace(config, method="vit"),
                notes=["a tower that was trained further: its head is left out"])


def _hub_settings(file):
    """-> settings next to a file of a hub; {"tokenizer": merges as "left right"}, if they are"""
    if file.name not in FILES:
        return {}, {}
    settings = {}
    for path in filter(Path.is_file, map(file.with_name, SETTINGS)):
        settings |= json.loads(path.read_bytes())
    merges = file.with_name("merges.txt")
    if not merges.is_file():
        return settings, {}
    return settings, dict(tokenizer=merges.read_text("utf-8").strip().split("\n")[1:])


def _rename(state):
    """{their name: tensor} -> {our name: float32 tensor}, first parts of names that are left out

    These are heads and decoders; of buffers and single numbers none is named.
    """
    # Text towers of CLIP, and image towers of timm, have no prefix.
    prefix = "text." if "text_projection" in state else "visual."
    weights = {}
    left_out = set()
    for name, x in state.items():
        part = name.partition(".")[0]
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        if name.startswith(TOWER):
            name = prefix + name
        if name.endswith(("position_ids", "attn_mask")):
            continue
        if name.startswith(KEPT):
            weights[name] = x.float()
        elif x.ndim:
            left_out.add(part)
    for name in list(weights):
        if ".q_proj." in name:
            parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            weights[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif name in ("image_projection", "text_projection"):
            weights[f"{name}.weight"] = weights.pop(name).T
    return weights, sorted(left_out)


def _fold_pixels(weights, view):
    """Let the patch embedding take pixels that are normalised as ours.  view: their mean and std"""
    std = torch.tensor(view["std"])
    scale = torch.tensor(IMAGENET_STD) / std                 # their pixels are ours * scale + shift
    shift = (torch.tensor(IMAGENET_MEAN) - torch.tensor(view["mean"])) / std
    kernel = weights["visual.patch_embed.proj.weight"]       # (D, 3, p, p)
    bias = weights.get("visual.patch_embed.proj.bias", 0)
    weights["visual.patch_embed.proj.weight"] = kernel * scale[:, None, None]
    weights["visual.patch_embed.proj.bias"] = (
        bias + (kernel * shift[:, None, None]).sum((1, 2, 3)))


def _config_of(weights, fields, view, tokenizer=None):
    """The ModelConfig of weights: what the shapes say, and `fields`; the shapes become ours."""
    width, _, patch_size, _ = weights["visual.patch_embed.proj.weight"].shape
    for name in ("visual.cls_token", "visual.pos_embed"):
        weights[name] = weights[name].reshape(1, -1, width)
    grid = math.isqrt(weights["visual.pos_embed"].size(1) - 1)
    depth = {tower: len({name.split(".")[2] for name in weights
                         if name.startswith(f"{tower}.blocks.")}) for tower in ("visual", "text")}
    bilinear = view.get("interpolation") in ("bilinear", 2)  # 2: Pillow's number
    shapes = dict(image_size=grid * patch_size, patch_size=patch_size, width=width,
                  depth=depth["visual"], heads=HEADS.get(width, width // 64),
                  pre_norm="visual.norm_pre.weight" in weights,
                  interpolation="bilinear" if bilinear else "bicubic")
    network = VisionModel
    if "text_projection.weight" in weights:
        network = CLIP
        words = weights["text.token_embedding.weight"]                   # (ids without [MASK], D)
        n_words = len(tokenizer) + FIXED - 1 if tokenizer else 49408  # CLIP's
        if len(words) != n_words:
            raise ValueError(f"its vocabulary has {len(words)} tokens instead of {n_words}, those "
                             "of its merges.txt or else of CLIP")
        weights["text.token_embedding.weight"] = F.pad(words, (0, 0, 0, 1))  # [MASK]
        shapes |= dict(context_length=len(weights["text.pos_embed"]), text_width=words.size(1),
                       text_depth=depth["text"], text_heads=words.size(1) // 64,
                       embed_dim=len(weights["text_projection.weight"]), vocab_size=n_words + 1)
    config = ModelConfig(**shapes | {name: x for name, x in fields.items() if x is not None})
    with torch.device("meta"):  # shapes without memory
        ours = network(config).state_dict()
    for name in {**ours, **weights}:
        if name not in ours or name not in weights or ours[name].shape != weights[name].shape:
            raise ValueError(f"{name} is missing, of another shape, or not supported")
    return config


# ---------------------------------------------------------------- what tensors do not say
# Of each kind: tensors, settings of a hub -> fields of ModelConfig (None: as the shapes say), and
# mean, std and interpolation of pixels

def _check(settings, **allowed):
    """ValueError for a setting that changes features and is not among those that are supported."""
    for name, values in allowed.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"its setting {name}: {settings[name]!r} is not supported, only "
                             f"{', '.join(map(repr, values))}")


def _check_open_clip(settings):
    towers = settings.get("model_cfg", {})
    for tower in ("vision_cfg", "text_cfg"):
        _check(towers.get(tower, {}), norm_kwargs=[None, {}], act_kwargs=[None, {}],
               final_ln_after_pool=[False], ls_init_value=[None], attentional_pool=[False],
               no_ln_pre=[False], pos_embed_type=["learnable"], no_causal_mask=[False],
               embed_cls=[False], proj_bias=[False], timm_pool=["token", ""], hf_model_name=[None])
    _check(towers.get("vision_cfg", {}), pool_type=["tok"])
    _check(towers.get("text_cfg", {}), pool_type=["argmax"], proj_type=["linear"])
    _check(settings.get("preprocess_cfg", {}), resize_mode=["shortest"])


def _clip(tensors, settings):
    """OpenAI's CLIP and open_clip's, whose image tower may be timm's."""
    _check_open_clip(settings)
    towers = settings.get("model_cfg", {})
    vision = towers.get("vision_cfg", {})
    quick = towers.get("quick_gelu", "input_resolution" in tensors)  # OpenAI's; open_clip: GELU
    fields = dict(quick_gelu=(quick, quick), image_norm_eps=1e-5)
    if "head_width" in vision:
        fields["heads"] = vision["width"] // vision["head_width"]
    if "visual.trunk.cls_token" in tensors:
        fields, _ = _timm(tensors, settings)
        fields["quick_gelu"] = (fields["quick_gelu"][0], quick)
    fields |= dict(method="clip", text_heads=towers.get("text_cfg", {}).get("heads"))
    return fields, dict(mean=CLIP_MEAN, std=CLIP_STD) | settings.get("preprocess_cfg", {})


def _slip(tensors, settings):
    """SLIP's CLIP, SLIP and SimCLR: timm's ViT, 12 heads in ViT-S, evaluated bilinearly."""
    method = "simclr"
    if "image_projection" in tensors:
        method = "slip" if "image_mlp.layer1.weight" in tensors else "clip"
    fields = dict(method=method, heads=16 if len(tensors["visual.norm.weight"]) == 1024 else 12)
    return fields, dict(mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear")


def _hugging_face(tensors, settings):
    """Hugging Face's CLIPModel."""
    vision = settings.get("vision_config", {})
    text = settings.get("text_config", {})
    for tower in (vision, text):
        _check(tower, hidden_act=["quick_gelu", "gelu"])
    _check(text, layer_norm_eps=[1e-5])
    _check(settings, do_center_crop=[True], do_normalize=[True], do_resize=[True],
           do_rescale=[True])
    quick = tuple(tower.get("hidden_act", "quick_gelu") == "quick_gelu" for tower in (vision, text))
    # A config.json leaves out what is transformers' default: 12 and 8 heads.
    fields = dict(method="clip", quick_gelu=quick,
                  heads=vision.get("num_attention_heads", 12 if vision else None),
                  image_norm_eps=vision.get("layer_norm_eps", 1e-5),
                  text_heads=text.get("num_attention_heads", 8 if text else None))
    return fields, dict(mean=settings.get("image_mean", CLIP_MEAN),
                        std=settings.get("image_std", CLIP_STD),
                        interpolation=settings.get("resample"))


def _timm(tensors, settings):
    """ViTs of timm and MAE: as config.json says, or else its architecture's name."""
    name = settings.get("architecture", "")
    arguments = settings.get("model_args", {})
    _check(arguments, act_layer=[None, "gelu", "quick_gelu"])
    _check(settings.get("pretrained_cfg", {}), crop_mode=["center"])
    act = arguments.get("act_layer", "quick_gelu" if "quickgelu" in name else "gelu")
    fields = dict(method="mae" if "mask_token" in tensors else "vit",
                  quick_gelu=(act == "quick_gelu", True), heads=arguments.get("num_heads"),
                  image_norm_eps=1e-5 if "_clip_" in name else 1e-6)
    return fields, dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) | settings.get("pretrained_cfg", {})


KINDS = (({"visual.class_embedding", "text_projection"}, _clip),
         ({"visual.trunk.cls_token", "text_projection"}, _clip),
         ({"visual.norm.weight", "visual.cls_token"}, _slip),
         ({"vision_model.embeddings.class_embedding"}, _hugging_face),
         ({"cls_token", "pos_embed", "patch_embed.proj.weight"}, _timm))
