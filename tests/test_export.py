"""Exports against their owners' code, and read back: equal features, token ids, names."""
import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import data
import evaluate
import model as models
from downstream import export
from tokenizer import Tokenizer

TEXTS = ["a red star above a blue circle", "Two DOGS' tails, 1984: don't!!  (really?)", "smörgåsbord, 你好 naïve", "",
         "the quick brown fox jumps over the lazy dog " * 9]
TINY = replace(models.PRESETS["tiny"], method="clip")
OPENAI = dict(quick_gelu=(True, True), pre_norm=True, image_norm_eps=1e-5)
KINDS = {"ours": {}, "12 heads": dict(width=96, heads=12), "quick images": dict(quick_gelu=(True, False)),
         "gelu": dict(quick_gelu=(False, False)), "quick": dict(quick_gelu=(True, True)), "openai": OPENAI}


def own_vocabulary():
    return Tokenizer.train(TEXTS + ["a photo of a red circle", "a blue star, a red dog"] * 3, 600)


def checkpoint(path, config, tokenizer):
    """A checkpoint with random weights everywhere: a bias, a norm, a position that is lost would not be seen at 0 or 1.

    -> the model
    """
    model = models.build(replace(config, vocab_size=len(tokenizer)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    torch.save(dict(model_config=dataclasses.asdict(model.config), model=model.state_dict(),
                    tokenizer=[" ".join(pair) for pair in tokenizer.merges]), path)
    return model.eval()


def pictures(config):
    generator = torch.Generator().manual_seed(1)
    return data.normalize(torch.randint(256, (2, config.image_size, config.image_size, 3), dtype=torch.uint8,
                                        generator=generator))


def same(ours, theirs, tolerance=1e-5):
    """Equal up to 1e-5 of their scale."""
    assert ours.shape == theirs.shape and theirs.std() > 0.01
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference < tolerance, f"{difference:.1e}"


def read_back(path, model, tokenizer=None):
    """load_model(path) gives the features of `model`, and the ids of `tokenizer`, if any."""
    loaded, words = evaluate.load_model(path)
    images = pictures(model.config)
    with torch.no_grad():
        same(loaded.visual(images), model.visual(images))
        if tokenizer is None:
            assert words is None
        else:
            tokens = tokenizer(TEXTS, model.config.context_length)
            assert words.merges == tokenizer.merges and torch.equal(words(TEXTS, model.config.context_length), tokens)
            same(loaded.encode_image(images), model.encode_image(images))
            same(loaded.encode_patches(images), model.encode_patches(images))
            same(loaded.encode_text(tokens), model.encode_text(tokens))
            assert loaded.logit_scale == model.logit_scale
    return loaded


def run(monkeypatch, *words):
    """The command line -> what it printed to stderr on its way out, or None."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    try:
        export.main()
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["hf", "open_clip"])
def test_pairs_are_read_back(form, kind, tmp_path):
    tokenizer = own_vocabulary()
    model = checkpoint(tmp_path / "last.pt", replace(TINY, interpolation="bilinear", **KINDS[kind]), tokenizer)
    export.export(tmp_path / "last.pt", form, tmp_path / "out")
    loaded = read_back(tmp_path / "out", model, tokenizer)
    assert loaded.config.interpolation == "bilinear" and not loaded.remarks
    assert [loaded.config.quick_gelu, loaded.config.heads] == [model.config.quick_gelu, model.config.heads]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["timm", "mae", "beit"])
def test_image_towers_are_read_back(form, kind, tmp_path):
    tokenizer = own_vocabulary()
    model = checkpoint(tmp_path / "last.pt", replace(TINY, interpolation="bilinear", **KINDS[kind]), tokenizer)
    if form != "timm" and (model.config.quick_gelu[0] or model.config.pre_norm):
        with pytest.raises(ValueError, match="the image tower has QuickGELU.*which MAE's and BEiT's have not"):
            export.export(tmp_path / "last.pt", form, tmp_path / "out")
        assert os.listdir(tmp_path) == ["last.pt"]
        return
    export.export(tmp_path / "last.pt", form, tmp_path / "out")
    loaded = read_back(tmp_path / "out", model)
    assert loaded.config.interpolation == "bilinear" and not loaded.remarks


@pytest.mark.parametrize("method", models.METHODS)
def test_every_method_has_an_image_tower(method, tmp_path):
    model = checkpoint(tmp_path / "last.pt", replace(TINY, method=method), own_vocabulary())
    export.export(tmp_path / "last.pt", "timm", tmp_path / "out")
    read_back(tmp_path / "out", model)
    if method in ("simclr", "mae"):
        for form in ("hf", "open_clip"):
            with pytest.raises(ValueError, match="last.pt has no text tower"):
                export.export(tmp_path / "last.pt", form, tmp_path / form)
    else:
        export.export(tmp_path / "last.pt", "hf", tmp_path / "pair")
        read_back(tmp_path / "pair", model, own_vocabulary())


def test_an_export_can_be_exported(tmp_path):
    tokenizer = own_vocabulary()
    model = checkpoint(tmp_path / "0", TINY, tokenizer)
    for i, form in enumerate(("hf", "open_clip", "hf", "timm")):
        export.export(tmp_path / str(i), form, tmp_path / str(i + 1))
    read_back(tmp_path / "3", model, tokenizer)
    read_back(tmp_path / "4", model)


def test_a_vocabulary_needs_its_merges(tmp_path):
    checkpoint(tmp_path / "last.pt", TINY, own_vocabulary())
    export.export(tmp_path / "last.pt", "hf", tmp_path / "out")
    merges = tmp_path / "out/merges.txt"
    merges.write_text(merges.read_text("utf-8") + "a b\n", "utf-8")
    with pytest.raises(ValueError, match="vocabulary has 556 tokens, and that of merges.txt 557"):
        evaluate.load_model(tmp_path / "out")
    merges.unlink()
    with pytest.raises(ValueError, match="vocabulary has 556 tokens: without a merges.txt"):
        evaluate.load_model(tmp_path / "out")


def test_beit_s_relative_positions_are_refused(tmp_path):
    checkpoint(tmp_path / "last.pt", TINY, own_vocabulary())
    export.export(tmp_path / "last.pt", "beit", tmp_path / "beit.pth")
    state = torch.load(tmp_path / "beit.pth")
    for name in ("blocks.0.attn.relative_position_bias_table", "blocks.0.gamma_1"):
        torch.save(dict(model=state["model"] | {name: torch.zeros(4)}), tmp_path / "beit.pth")
        with pytest.raises(ValueError, match=f"it has {name}"):
            evaluate.load_model(tmp_path / "beit.pth")


def test_what_is_not_an_export_stays(tmp_path, monkeypatch):
    """Only what this command wrote is replaced, as a whole."""
    checkpoint(tmp_path / "last.pt", TINY, own_vocabulary())
    for form in ("hf", "timm"):  # over an empty folder, then over an export: nothing of it is left
        (tmp_path / "out").mkdir(exist_ok=True)
        assert run(monkeypatch, tmp_path / "last.pt", "--format", form, "--out", tmp_path / "out") is None
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "out"]
    assert "is a folder, and --format mae is none" in run(
        monkeypatch, tmp_path / "last.pt", "--format", "mae", "--out", tmp_path / "out")

    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/model.safetensors").write_bytes(before)
    for out in ("out", "foreign", "last.pt"):
        for form in export.FORMATS:
            said = run(monkeypatch, tmp_path / "last.pt", "--format", form, "--out", tmp_path / out)
            assert said.startswith("export.py: error: ") and "holds more than an export" in said
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "foreign/model.safetensors").read_bytes() == before
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_one_sentence_and_no_traceback(tmp_path):
    """From any folder, as a program."""
    done = subprocess.run([sys.executable, Path(export.__file__).resolve(), "none.pt", "--format", "hf", "--out", "x"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and os.listdir(tmp_path) == []
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("export.py: error: ") and "none.pt" in done.stderr


def plain_vit(width, depth, tokens, patch):
    """Names and shapes of MAE's ViT (models_vit.py, mae_pretrain_vit_base.pth)."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width), "norm.weight": (width,),
              "norm.bias": (width,), "patch_embed.proj.weight": (width, 3, patch, patch),
              "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes |= {f"blocks.{i}.{name}.weight": (rows * width, columns * width),
                       f"blocks.{i}.{name}.bias": (rows * width,)}
    return shapes


def test_names_and_shapes_of_the_single_files(tmp_path):
    """What MAE's fine-tuning, detectron2's and mmdet's ViTDet, and unilm's BEiT look for in a ViT-B/16."""
    config = replace(models.PRESETS["vit_b16"], method="simclr", depth=2, ssl_hidden=8, ssl_dim=8)
    checkpoint(tmp_path / "last.pt", config, own_vocabulary())
    states = {}
    for form in ("mae", "beit"):
        export.export(tmp_path / "last.pt", form, tmp_path / form)
        states[form] = torch.load(tmp_path / form, weights_only=True)["model"]
    mae = plain_vit(768, 2, 197, 16)
    assert {name: tuple(x.shape) for name, x in states["mae"].items()} == mae
    # ViTDet has neither class token nor last norm; its relative positions start at zero, so they are in no file.
    vitdet = mae.keys() - {"cls_token", "norm.weight", "norm.bias"}
    assert len(vitdet) == 3 + 2 * 12 and {f"backbone.net.{name}" for name in vitdet} >= {
        "backbone.net.pos_embed", "backbone.net.patch_embed.proj.weight", "backbone.net.blocks.1.attn.qkv.bias"}
    beit = {name: shape for name, shape in mae.items() if not name.endswith("qkv.bias")}
    beit |= {f"blocks.{i}.attn.{part}_bias": (768,) for i in range(2) for part in "qv"}
    assert {name: tuple(x.shape) for name, x in states["beit"].items()} == beit


# ---------------------------------------------------------------- the owners' code

B32 = dict(vit_b32=replace(models.PRESETS["vit_b32"], method="clip", depth=2, text_depth=2), tiny=TINY,
           vit_s16=replace(models.PRESETS["vit_s16"], method="clip", depth=2, text_depth=1))
SHAPES = [("tiny", kind) for kind in KINDS] + [("vit_b32", "ours"), ("vit_b32", "openai"), ("vit_s16", "ours")]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).filter(
    ImageFilter.GaussianBlur(3))


def seen(config):
    """PICTURE as evaluate.py shows it to a model."""
    return data.normalize(torch.from_numpy(np.array(evaluate.evaluation_view(config)(PICTURE))))


def exported(form, shape, kind, tmp_path):
    """-> the model, its tokenizer (CLIP's but for tiny), what was written"""
    tokenizer = own_vocabulary() if shape == "tiny" else Tokenizer.clip()
    model = checkpoint(tmp_path / "last.pt", replace(B32[shape], **KINDS[kind]), tokenizer)
    export.export(tmp_path / "last.pt", form, tmp_path / "out")
    return model, tokenizer, tmp_path / "out"


@pytest.mark.peers
@pytest.mark.parametrize("shape,kind", SHAPES)
def test_timm_loads_it(shape, kind, tmp_path):
    timm = pytest.importorskip("timm")
    model, _, out = exported("timm", shape, kind, tmp_path)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = pictures(model.config)
    with torch.no_grad():
        same(theirs.forward_features(images), model.visual(images))
        same(theirs(images), model.visual(images)[:, 0])
    view = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
    assert torch.allclose(view(PICTURE), seen(model.config), atol=1e-5)
    classes = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)
    assert classes.head.out_features == 7 and torch.equal(classes.pos_embed, theirs.pos_embed)


@pytest.mark.peers
@pytest.mark.parametrize("form", ["mae", "beit"])
def test_timm_s_plain_vit_and_beit_load_the_single_files(form, tmp_path):
    """timm's BEiT has unilm's names; MAE's ViT is timm's."""
    timm = pytest.importorskip("timm")
    model, _, out = exported(form, "tiny", "12 heads", tmp_path)
    c = model.config
    shape = dict(img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.width, depth=c.depth, num_heads=c.heads,
                 num_classes=0, global_pool="token")
    theirs = (timm.models.VisionTransformer(**shape) if form == "mae" else
              timm.models.beit.Beit(**shape, use_abs_pos_emb=True, init_values=None))
    theirs.load_state_dict(torch.load(out, weights_only=True)["model"])
    images = pictures(c)
    with torch.no_grad():
        same(theirs.eval().forward_features(images), model.visual(images))


@pytest.mark.peers
@pytest.mark.parametrize("shape,kind", SHAPES)
def test_hugging_face_loads_it(shape, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer, out = exported("hf", shape, kind, tmp_path)
    theirs, info = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    words = transformers.CLIPTokenizer.from_pretrained(out)
    context = model.config.context_length
    batch = words(TEXTS, padding=True, truncation=True, max_length=context, return_tensors="pt")
    tokens = tokenizer(TEXTS, context)
    for row, mask, mine in zip(batch["input_ids"], batch["attention_mask"], tokens):
        length = mask.sum()
        assert torch.equal(row[:length], mine[:length]) and mine[length - 1] == tokenizer.eot
    images = pictures(model.config)
    with torch.no_grad():
        got = theirs(pixel_values=images, **batch)
        image, text = model.encode_image(images), model.encode_text(tokens)
        same(theirs.visual_projection(theirs.vision_model(images).pooler_output), image)
        same(theirs.text_projection(theirs.text_model(**batch).pooler_output), text)
        image, text = (torch.nn.functional.normalize(x, dim=1) for x in (image, text))
        same(got.logits_per_image, model.logit_scale.exp() * image @ text.T)
    view = transformers.CLIPImageProcessor.from_pretrained(out)
    theirs = view(PICTURE, return_tensors="pt").pixel_values[0]
    assert theirs.shape == seen(model.config).shape
    assert (theirs - seen(model.config)).abs().mean() < 0.02  # another resampler: levels of 255 are 0.017


@pytest.mark.peers
@pytest.mark.parametrize("shape,kind", [*SHAPES, ("vit_b32", "full depth")])
def test_open_clip_loads_it(shape, kind, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setitem(KINDS, "full depth", dict(depth=12))  # the shape that timm has under a name
    model, tokenizer, out = exported("open_clip", shape, kind, tmp_path)
    assert (out / "config.json").exists() == (kind in ("ours", "12 heads", "quick images"))
    theirs, _, view = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    mine = tokenizer(TEXTS, model.config.context_length)
    ends = (tokens == tokenizer.eot).int().argmax(1)
    assert tokens.shape == (len(TEXTS), model.config.context_length)
    assert all(torch.equal(row[:end + 1], ids[:end + 1]) for row, end, ids in zip(tokens, ends, mine))
    images = pictures(model.config)
    with torch.no_grad():
        same(theirs.encode_image(images), model.encode_image(images))
        same(theirs.encode_text(tokens), model.encode_text(mine))
        assert theirs.logit_scale == model.logit_scale
    assert torch.allclose(view(PICTURE), seen(model.config), atol=1e-5)
    read_back(out, model, tokenizer)


@pytest.mark.peers
def test_safetensors_are_the_library_s(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5).T, "b": torch.tensor(2.5), "longer name": torch.randn(2, 1, 7)}
    (tmp_path / "x.safetensors").write_bytes(export.safetensors(tensors))
    for read in (library.load_file, evaluate.read_safetensors):
        loaded = read(tmp_path / "x.safetensors")
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], x) for name, x in tensors.items())
