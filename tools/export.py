"""Writes a checkpoint as a folder for timm, Hugging Face's transformers or open_clip.

Names and settings: timm 1.0 (vision_transformer.py), transformers 5 (modeling_clip.py), open_clip
3.3 (factory.py).  Features stay the same up to rounding, and evaluate.py reads each format back.
timm's names are also those of MAE and of ViTDet.

    python tools/export.py runs/demo-maskclip/last.pt --format hf --out exported
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
from support.runtime import run_program
from tokenizer import MASK, Tokenizer

# Parts of our names -> theirs, replaced in this order.
CLIP_NAMES = (("text.norm.", "ln_final."), ("text.blocks.", "transformer.resblocks."),
              ("text.pos_embed", "positional_embedding"), ("text.token", "token"),
              ("norm1", "ln_1"), ("norm2", "ln_2"), ("qkv.", "in_proj_"),
              ("attn.proj", "attn.out_proj"), ("fc1", "c_fc"), ("fc2", "c_proj"))
HF_NAMES = (("visual.norm.", "vision_model.post_layernorm."), ("visual.", "vision_model."),
            ("text.norm.", "text_model.final_layer_norm."), ("text.", "text_model."),
            ("blocks.", "encoder.layers."), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
            ("attn.", "self_attn."), ("attn.proj", "attn.out_proj"), ("norm_pre", "pre_layrnorm"),
            ("cls_token", "embeddings.class_embedding"),
            ("pos_embed", "embeddings.position_embedding.weight"),
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("token_embedding", "embeddings.token_embedding"),
            ("image_projection", "visual_projection"))


def renamed(weights, renames):
    """{our name: tensor} -> {name after all renames: tensor}"""
    theirs = {}
    for name, tensor in weights.items():
        for ours, new in renames:
            name = name.replace(ours, new)
        theirs[name] = tensor
    return theirs


def image_weights(model, patch_bias):
    """The image tower in float32.  Without patch_bias, that bias is in the positions (exact)."""
    image = {name: x.float() for name, x in model.visual.state_dict().items()}
    if "patch_embed.proj.bias" in image and not patch_bias:
        bias = image.pop("patch_embed.proj.bias")
        first, patches = image["pos_embed"].tensor_split([1], 1)
        image["pos_embed"] = torch.cat([first, patches + bias], 1)
    return image


def text_weights(model):
    """The text tower in float32, and the projections to the joint space.

    [MASK], the last row of the vocabulary, is left out: no caption has it.
    """
    parts = ("text.", "text_projection", "image_projection", "logit_scale")
    text = {name: x.float() for name, x in model.state_dict().items() if name.startswith(parts)}
    return text | {"text.token_embedding.weight": text["text.token_embedding.weight"][:-1]}


def tokenizer_files(tokenizer, context_length):
    """Hugging Face's CLIPTokenizer, without [MASK]."""
    vocabulary = {symbol: i for symbol, i in tokenizer.ids.items() if symbol != MASK}
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.merges)
    settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=context_length)
    return {"vocab.json": vocabulary, "merges.txt": f"#version: 0.2\n{merges}",
            "tokenizer_config.json": settings}


# Each format is a function of model, tokenizer and folder -> {name of a file: tensors, dict or str}
def to_timm(model, tokenizer, out):
    """timm.create_model("local-dir:FOLDER", pretrained=True)"""
    c = model.config
    # Of these two architectures only the eps of the norms is taken: all else is an argument.
    kind = "clip_224" if c.image_norm_eps == 1e-5 else "224"
    arguments = dict(img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.width,
                     depth=c.depth, num_heads=c.heads, pre_norm=c.pre_norm,
                     act_layer="quick_gelu" if c.quick_gelu[0] else "gelu")
    view = dict(input_size=[3, c.image_size, c.image_size], crop_pct=1.0, crop_mode="center",
                interpolation=c.interpolation, mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD,
                num_classes=0, first_conv="patch_embed.proj", classifier="head")
    config = dict(architecture=f"vit_base_patch16_{kind}", num_classes=0, num_features=c.width,
                  global_pool="token", model_args=arguments, pretrained_cfg=view)
    # A norm before the first block leaves timm's patch embedding without a bias.
    weights = image_weights(model, patch_bias=not c.pre_norm)
    return {"model.safetensors": weights, "config.json": config}


def to_hugging_face(model, tokenizer, out):
    """CLIPModel.from_pretrained("FOLDER"), CLIPTokenizer.from_pretrained("FOLDER")

    CLIPModel has a layer norm before the first block.  If our model has none, that norm is made
    linear: for inputs scaled by a = 2^-40 the variance vanishes against eps, and the norm computes
    a (x - mean) / sqrt(eps) * sqrt(eps) / a = x - mean.  A constant over the channels changes
    nothing, because each reader of the residual stream begins with a layer norm.
    """
    c = model.config
    image = image_weights(model, patch_bias=False)
    image["cls_token"] = image["cls_token"][0, 0]   # (D,)
    image["pos_embed"] = image["pos_embed"][0]      # (1 + N, D)
    if not c.pre_norm:
        scale = 2.0 ** -40
        for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
            image[name] = image[name] * scale
        image["norm_pre.weight"] = torch.full((c.width,), c.image_norm_eps ** 0.5 / scale)
        image["norm_pre.bias"] = torch.zeros(c.width)
        print("note: some weights are about 1e-14: use this export in float32 or bfloat16, and do "
              "not train it further")
    weights = text_weights(model) | {f"visual.{name}": x for name, x in image.items()}
    weights = renamed(weights, HF_NAMES)
    for name in list(weights):
        if ".qkv." in name:
            for part, x in zip("qkv", weights.pop(name).chunk(3)):
                weights[name.replace("qkv", f"{part}_proj")] = x
    activation = {True: "quick_gelu", False: "gelu"}
    vision = dict(hidden_size=c.width, intermediate_size=4 * c.width, num_hidden_layers=c.depth,
                  num_attention_heads=c.heads, layer_norm_eps=c.image_norm_eps,
                  hidden_act=activation[c.quick_gelu[0]], image_size=c.image_size,
                  patch_size=c.patch_size, projection_dim=c.embed_dim)
    text = dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width,
                num_hidden_layers=c.text_depth, num_attention_heads=c.text_heads,
                layer_norm_eps=1e-5, hidden_act=activation[c.quick_gelu[1]],
                projection_dim=c.embed_dim,
                vocab_size=c.vocab_size - 1, max_position_embeddings=c.context_length,
                bos_token_id=tokenizer.sot, eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot)
    config = dict(architectures=["CLIPModel"], model_type="clip", projection_dim=c.embed_dim,
                  vision_config=vision, text_config=text)
    view = dict(image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=c.image_size),
                crop_size=dict(height=c.image_size, width=c.image_size),
                resample=2 if c.interpolation == "bilinear" else 3,  # Pillow's numbers
                image_mean=data.IMAGENET_MEAN, image_std=data.IMAGENET_STD)
    return {"model.safetensors": weights, "config.json": config,
            "preprocessor_config.json": view, **tokenizer_files(tokenizer, c.context_length)}


def to_open_clip(model, tokenizer, out):
    """open_clip.create_model("local-dir:FOLDER"), open_clip.get_tokenizer("local-dir:FOLDER")

    open_clip's own two towers share one activation, which ours need not.  So its image tower is
    timm's, by the path of the folder, which also holds timm's config.json.
    """
    c = model.config
    files = to_timm(model, tokenizer, out)
    weights = {f"visual.trunk.{name}": x for name, x in files.pop("model.safetensors").items()}
    weights |= renamed(text_weights(model), CLIP_NAMES)
    weights["visual.head.proj.weight"] = weights.pop("image_projection.weight")
    weights["text_projection"] = weights.pop("text_projection.weight").T
    vision = dict(image_size=c.image_size, timm_model_name=f"local-dir:{out.resolve()}",
                  timm_pool="token", timm_proj="linear")
    print(f"note: if you move {out}, change timm_model_name in its open_clip_config.json")
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size - 1, width=c.text_width,
                heads=c.text_heads, layers=c.text_depth)
    if len(tokenizer) != 49409 or tokenizer.merges != Tokenizer.clip().merges:
        text["hf_tokenizer_name"] = "."  # any name: of a local-dir, open_clip reads the folder
        files |= tokenizer_files(tokenizer, c.context_length)
    towers = dict(embed_dim=c.embed_dim, quick_gelu=c.quick_gelu[1], vision_cfg=vision,
                  text_cfg=text)
    view = dict(mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD, interpolation=c.interpolation,
                resize_mode="shortest")
    return files | {"open_clip_config.json": dict(model_cfg=towers, preprocess_cfg=view),
                    "open_clip_model.safetensors": weights}


FORMATS = dict(timm=to_timm, hf=to_hugging_face, open_clip=to_open_clip)

def export(checkpoint, name, out):
    """Write a checkpoint as the new folder `out`; ValueError or OSError if that cannot be."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError("exports need the package safetensors: pip install safetensors") from None
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or give another --out")
    model, tokenizer = evaluate.load_model(checkpoint)
    if name != "timm" and tokenizer is None:
        raise ValueError(f"{checkpoint} has no text tower: use --format timm")
    files = FORMATS[name](model, tokenizer, out)
    out.mkdir(parents=True)
    for file, content in files.items():
        if file.endswith(".safetensors"):
            weights = {key: x.detach().clone(memory_format=torch.contiguous_format)
                       for key, x in content.items()}
            (out / file).write_bytes(save(weights, {"format": "pt"}))  # save_file's is mode 600
            continue
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (out / file).write_text(text, "utf-8")
    usage = FORMATS[name].__doc__.splitlines()[0].replace("FOLDER", str(out))
    print(f"wrote {out}: {usage}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="any weights that evaluate.py reads")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="the folder to write")
    args = parser.parse_args()
    run_program("export.py", lambda: export(args.checkpoint, args.format, args.out))


if __name__ == "__main__":
    main()
