"""Writes a checkpoint in the form of timm, Hugging Face, open_clip, MAE or BEiT, for what serves or trains with these.

Names and settings: timm 1.0 (vision_transformer.py), transformers 5 (modeling_clip.py), open_clip 3.3 (factory.py), MAE
(models_vit.py), unilm's BEiT (modeling_finetune.py).  Features stay what they were, up to rounding, and evaluate.py
reads every format back.  Patch features of the joint space (encode_patches) are ours alone.

    python downstream/export.py runs/demo-maskclip/last.pt --format hf --out exported
"""
import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
from tokenizer import EOT, MASK, SOT, Tokenizer, write_atomically

MARK = "maskclip/downstream/export.py"  # in every file of weights: what bears it may be written over
FILES = {*evaluate.NAMES, *evaluate.SETTINGS, "vocab.json", "tokenizer_config.json"}

# timm's plain ViTs with a norm's eps of 1e-6, at 224 pixels: patch, width, depth, heads
PLAIN = {(16, 768, 12, 12): "vit_base_patch16_224", (32, 768, 12, 12): "vit_base_patch32_224",
         (16, 1024, 24, 16): "vit_large_patch16_224"}

# Parts of our names -> theirs, in this order.
CLIP_NAMES = (("blocks.", "transformer.resblocks."), ("norm1", "ln_1"), ("norm2", "ln_2"), ("qkv.", "in_proj_"),
              ("attn.proj", "attn.out_proj"), ("fc1", "c_fc"), ("fc2", "c_proj"), ("norm_pre", "ln_pre"),
              ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("patch_embed.proj", "conv1"))
HF_NAMES = (("blocks.", "encoder.layers."), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.", "self_attn."),
            ("attn.proj", "attn.out_proj"), ("norm_pre", "pre_layrnorm"), ("cls_token", "embeddings.class_embedding"),
            ("pos_embed", "embeddings.position_embedding.weight"), ("patch_embed.proj", "embeddings.patch_embedding"),
            ("token_embedding", "embeddings.token_embedding"))

# ---------------------------------------------------------------- weights

def renamed(weights, prefix, *renames):
    """{our name: tensor} -> {prefix + name after all renames: tensor}"""
    theirs = {}
    for name, x in weights.items():
        for old, new in renames:
            name = name.replace(old, new)
        theirs[prefix + name] = x
    return theirs


def tower(module):
    """Copies of a tower's weights, float32, for they are changed here."""
    return {name: x.detach().float().clone() for name, x in module.state_dict().items()}


def without_patch_bias(image):
    """CLIP's patch embeddings have no bias: it goes into the positions of the patches, which is exact."""
    image["pos_embed"][:, 1:] += image.pop("patch_embed.proj.bias", 0)
    return image


def clip_image(model):
    """The image tower as CLIP's have it: no bias of the patches, class token (D,), positions (1 + N, D)."""
    image = without_patch_bias(tower(model.visual))
    return image | {name: image[name].flatten(0, -2).squeeze(0) for name in ("cls_token", "pos_embed")}


def clip_text(model):
    """The text tower without [MASK], the last row of its vocabulary: no caption holds it."""
    text = tower(model.text)
    return text | {"token_embedding.weight": text["token_embedding.weight"][:-1]}


def timm_image(model):
    """The image tower in timm's names, which are ours; timm has a bias of the patches unless a norm follows it."""
    image = tower(model.visual)
    if model.config.pre_norm:
        return without_patch_bias(image)
    return {"patch_embed.proj.bias": torch.zeros(model.config.width)} | image


def safetensors(tensors):
    """{name: float32 tensor} -> the bytes of a file that evaluate.read_safetensors reads."""
    header, end = {"__metadata__": dict(format="pt", made_by=MARK)}, 0
    for name, x in tensors.items():
        start, end = end, end + 4 * x.numel()
        header[name] = dict(dtype="F32", shape=list(x.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join([len(text).to_bytes(8, "little"), text, *(x.numpy().tobytes() for x in tensors.values())])


# ---------------------------------------------------------------- settings

def as_json(settings):
    """-> the bytes of a JSON file."""
    return json.dumps(settings, indent=2, ensure_ascii=False).encode()


def timm_config(c):
    """timm's config.json.  Of the architecture only the norms' eps counts, for every argument is given."""
    architectures = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
    if c.image_norm_eps not in architectures:
        raise ValueError(f"the image tower's norms have an eps of {c.image_norm_eps}: timm's have 1e-6 or 1e-5")
    return dict(
        architecture=architectures[c.image_norm_eps], num_classes=0, num_features=c.width, global_pool="token",
        model_args=dict(img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.width, depth=c.depth,
                        num_heads=c.heads, pre_norm=c.pre_norm, act_layer="quick_gelu" if c.quick_gelu[0] else "gelu"),
        pretrained_cfg=dict(input_size=[3, c.image_size, c.image_size], fixed_input_size=True, crop_pct=1.0,
                            crop_mode="center", interpolation=c.interpolation, mean=data.IMAGENET_MEAN,
                            std=data.IMAGENET_STD, num_classes=0, first_conv="patch_embed.proj", classifier="head"))


def tokenizer_files(tokenizer, context_length):
    """Hugging Face's CLIPTokenizer without [MASK].  It does not mend text as ours does (ftfy, HTML entities)."""
    vocabulary = {symbol: i for symbol, i in tokenizer.ids.items() if symbol != MASK}
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.merges)
    return {"vocab.json": as_json(vocabulary), "merges.txt": f"#version: 0.2\n{merges}".encode(),
            "tokenizer_config.json": as_json(dict(
                tokenizer_class="CLIPTokenizer", bos_token=SOT, eos_token=EOT, unk_token=EOT, pad_token=EOT,
                do_lower_case=True, model_max_length=context_length))}


# ---------------------------------------------------------------- formats: model, tokenizer, folder -> {name: bytes}

def to_timm(model, tokenizer, out):
    """A folder for timm.create_model("local-dir:FOLDER", pretrained=True)."""
    return {"model.safetensors": safetensors(timm_image(model)), "config.json": as_json(timm_config(model.config))}


def to_hugging_face(model, tokenizer, out):
    """A folder for CLIPModel.from_pretrained and CLIPTokenizer.from_pretrained.

    CLIPModel has a layer norm before the first block.  Where ours has none, that norm is made linear: of inputs scaled
    by 2^-40 the variance is nothing beside eps, so (a x - mean) / sqrt(eps) * sqrt(eps) / a = x - mean(x); and a
    constant over the channels is not seen by the layer norm with which every reader of the residual stream begins.
    """
    c, image, scale = model.config, clip_image(model), 2.0 ** -40
    if not c.pre_norm:
        for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
            image[name] *= scale
        image["norm_pre.weight"] = torch.full((c.width,), c.image_norm_eps ** 0.5 / scale)
        image["norm_pre.bias"] = torch.zeros(c.width)
        print("CLIPModel has a layer norm before the first block, which this image tower has not: weights of about "
              "1e-14\nmake it do nothing.  Use it in float32 or bfloat16 (in float16 they are 0), and train further "
              "from another format.")
    weights = renamed(image, "vision_model.", ("norm.", "post_layernorm."), *HF_NAMES)
    weights |= renamed(clip_text(model), "text_model.", ("norm.", "final_layer_norm."), *HF_NAMES)
    for name in [name for name in weights if ".qkv." in name]:
        parts = weights.pop(name).chunk(3)
        weights |= {name.replace("qkv", f"{part}_proj"): x for part, x in zip("qkv", parts, strict=True)}
    weights |= {"visual_projection.weight": model.image_projection.weight.detach(),
                "text_projection.weight": model.text_projection.weight.detach(),
                "logit_scale": model.logit_scale.detach()}

    def settings(width, depth, heads, eps, quick, **more):
        return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads,
                    layer_norm_eps=eps, hidden_act="quick_gelu" if quick else "gelu", **more)
    config = dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=c.embed_dim,
        vision_config=settings(c.width, c.depth, c.heads, c.image_norm_eps, c.quick_gelu[0], image_size=c.image_size,
                               patch_size=c.patch_size),
        text_config=settings(c.text_width, c.text_depth, c.text_heads, 1e-5, c.quick_gelu[1],
                             vocab_size=c.vocab_size - 1, max_position_embeddings=c.context_length,
                             bos_token_id=tokenizer.sot, eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot))
    view = dict(image_processor_type="CLIPImageProcessor", do_resize=True, size=dict(shortest_edge=c.image_size),
                resample=int(evaluate.RESAMPLE[c.interpolation]), do_center_crop=True,
                crop_size=dict(height=c.image_size, width=c.image_size), do_rescale=True, rescale_factor=1 / 255,
                do_normalize=True, image_mean=data.IMAGENET_MEAN, image_std=data.IMAGENET_STD, do_convert_rgb=True)
    return {"model.safetensors": safetensors(weights), "config.json": as_json(config),
            "preprocessor_config.json": as_json(view), **tokenizer_files(tokenizer, c.context_length)}


def to_open_clip(model, tokenizer, out):
    """A folder for open_clip.create_model("local-dir:FOLDER") and open_clip.get_tokenizer("local-dir:FOLDER").

    open_clip has one switch for the activation of both its own towers.  Where ours differ, the image tower is timm's,
    by name where timm has one of that shape, else by the path of the folder, which also holds timm's config.json.
    """
    c, files, vision = model.config, {}, dict(image_size=model.config.image_size)
    if c.quick_gelu[0] == c.quick_gelu[1]:
        weights = renamed(clip_image(model), "visual.", ("norm.", "ln_post."), *CLIP_NAMES)
        weights["visual.proj"] = model.image_projection.weight.detach().T
        vision |= dict(layers=c.depth, width=c.width, head_width=c.width // c.heads, patch_size=c.patch_size,
                       no_ln_pre=not c.pre_norm, norm_kwargs=dict(eps=c.image_norm_eps))
    else:
        weights = renamed(timm_image(model), "visual.trunk.")
        weights["visual.head.proj.weight"] = model.image_projection.weight.detach()
        settings = timm_config(c)
        usual = not (c.quick_gelu[0] or c.pre_norm) and (c.image_size, c.image_norm_eps) == (224, 1e-6)
        name = PLAIN.get((c.patch_size, c.width, c.depth, c.heads)) if usual else None
        if name is None:
            name, files["config.json"] = f"local-dir:{out.resolve()}", as_json(settings)
            print(f"open_clip finds the shape of this image tower by the path of its folder: if you move {out}, change "
                  "timm_model_name in its open_clip_config.json.")
        vision |= dict(timm_model_name=name, timm_pool="token", timm_proj="linear")
    weights |= renamed(clip_text(model), "", ("norm.", "ln_final."), *CLIP_NAMES)
    weights |= {"text_projection": model.text_projection.weight.detach().T, "logit_scale": model.logit_scale.detach()}
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size - 1, width=c.text_width, heads=c.text_heads,
                layers=c.text_depth)
    if len(tokenizer) != 49409 or tokenizer.merges != Tokenizer.clip().merges:
        text["hf_tokenizer_name"] = "."  # any name: for a local-dir open_clip reads the folder itself
        files |= tokenizer_files(tokenizer, c.context_length)
    config = dict(model_cfg=dict(embed_dim=c.embed_dim, quick_gelu=c.quick_gelu[1], vision_cfg=vision, text_cfg=text),
                  preprocess_cfg=dict(mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD, interpolation=c.interpolation,
                                      resize_mode="shortest"))
    return {"open_clip_model.safetensors": safetensors(weights), "open_clip_config.json": as_json(config), **files}


def to_mae(model, tokenizer, out):
    """One file for MAE's fine-tuning, detectron2's and mmdet's ViTDet, and mmseg's MAE by its beit2mmseg.py."""
    return plain_file(model, timm_image(model))


def to_beit(model, tokenizer, out):
    """One file for unilm's BEiT with absolute positions, without relative ones and layer scale.

    BEiT's keys have no bias.  Nothing is lost: it adds the same to a query's products with all keys, which softmax
    does not see.
    """
    image = timm_image(model)
    for name in [name for name in image if name.endswith("qkv.bias")]:
        q, _, v = image.pop(name).chunk(3)
        image |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    return plain_file(model, image)


def plain_file(model, image):
    """torch.save of {"model": weights} and, for evaluate.py, timm's settings.  ValueError where MAE's ViT differs."""
    c, file = model.config, io.BytesIO()
    found = {"QuickGELU": c.quick_gelu[0], "a norm before its first block": c.pre_norm,
             f"norms with an eps of {c.image_norm_eps}": c.image_norm_eps != 1e-6}
    differs = [what for what, there in found.items() if there]
    if differs:
        raise ValueError(f"the image tower has {' and '.join(differs)}, which MAE's and BEiT's have not: "
                         "--format timm can say so")
    torch.save(dict(made_by=MARK, model=image, **timm_config(c)), file)
    return file.getvalue()


FORMATS = dict(timm=to_timm, hf=to_hugging_face, open_clip=to_open_clip, mae=to_mae, beit=to_beit)

# ---------------------------------------------------------------- files

def is_export(path):
    """Whether a file, or a folder and everything in it, was written by this command; an empty folder will do."""
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        weights = names & set(evaluate.NAMES)
        return not names or names <= FILES and bool(weights) and all(is_export(path / name) for name in weights)
    with open(path, "rb") as file:
        return MARK.encode() in file.read(2 ** 20)  # both kinds of files begin with their names and settings


def write(out, content):
    """Writes bytes, or a folder of {name: bytes}, so that no reader sees half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        return write_atomically(out, content)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        new.mkdir()
        for name, file in content.items():
            (new / name).write_bytes(file)
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)


def export(checkpoint, form, out):
    """checkpoint: whatever evaluate.load_model reads.  Raises OSError, or ValueError for what cannot be expressed."""
    out = Path(out)
    if out.exists() and not is_export(out):
        raise ValueError(f"{out} is there already and holds more than an export: move it away, or give another --out")
    if out.exists() and out.is_dir() == (form in ("mae", "beit")):
        raise ValueError(f"{out} is a {'folder' if out.is_dir() else 'file'}, and --format {form} is none")
    model, tokenizer = evaluate.load_model(checkpoint)
    if form in ("hf", "open_clip") and tokenizer is None:
        raise ValueError(f"{checkpoint} has no text tower, which --format {form} needs: timm, mae and beit remain")
    write(out, FORMATS[form](model, tokenizer, out))
    print(f"{out}: {FORMATS[form].__doc__.splitlines()[0].replace('FOLDER', str(out))}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help=evaluate.FORMATS)
    parser.add_argument("--format", required=True, choices=FORMATS, help="timm, hf and open_clip are folders; mae and "
                        "beit one file")
    parser.add_argument("--out", required=True, help="what to write; an older export there is replaced")
    args = parser.parse_args()
    try:
        export(args.checkpoint, args.format, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"export.py: error: {str(error).splitlines()[-1]}")


if __name__ == "__main__":
    main()
