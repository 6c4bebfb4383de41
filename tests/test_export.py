"""Exports against their owners' code, and read back: equal features, token ids, names."""
import dataclasses
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import answer
from PIL import Image, ImageFilter

import data
import evaluate
import model as models
from tokenizer import Tokenizer
from tools import export

TEXTS = ["a red star above a blue circle", "Two DOGS' tails, 1984: don't!!  (really?)",
         "smörgåsbord, 你好 naïve", "", "the quick brown fox jumps over the lazy dog " * 9]
TINY = replace(models.PRESETS["tiny"], method="clip")
KINDS = {"ours": {}, "12 heads": dict(width=96, heads=12),
         "quick images": dict(quick_gelu=(True, False)),
         "openai": dict(quick_gelu=(True, True), pre_norm=True, image_norm_eps=1e-5)}
VOCABULARY = Tokenizer.train(TEXTS + ["a photo of a red circle", "a blue star, a red dog"] * 3, 600)


def checkpoint(path, config, tokenizer=VOCABULARY):
    """A checkpoint with random weights everywhere, so that none can be lost unseen -> the model."""
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
    shape = (2, config.image_size, config.image_size, 3)
    return data.normalize(torch.randint(256, shape, dtype=torch.uint8, generator=generator))


def same(ours, theirs):
    assert ours.shape == theirs.shape and theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def write(files, folder):
    """What export.export writes, with the weights in a file of torch.save."""
    folder.mkdir()
    for name, content in files.items():
        if name.endswith(".safetensors"):
            torch.save(content, folder / name.replace("model.safetensors", "pytorch_model.bin"))
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, "utf-8")
    return folder


@torch.no_grad()
def read_back(path, model, tokenizer=None):
    """load_model(path) gives the features of `model`, and the ids of `tokenizer`, if any."""
    loaded, vocabulary = evaluate.load_model(path)
    images = pictures(model.config)
    same(loaded.visual(images), model.visual(images))
    assert not loaded.notes and loaded.config.interpolation == model.config.interpolation
    if tokenizer is None:
        return
    tokens = tokenizer(TEXTS, model.config.context_length)
    assert vocabulary.merges == tokenizer.merges
    assert torch.equal(vocabulary(TEXTS, model.config.context_length), tokens)
    assert loaded.config.quick_gelu == model.config.quick_gelu
    same(loaded.encode_image(images), model.encode_image(images))
    same(loaded.encode_patches(images), model.encode_patches(images))
    same(loaded.encode_text(tokens), model.encode_text(tokens))
    assert loaded.logit_scale == model.logit_scale


@pytest.mark.parametrize("kind", ["ours", "openai"])  # all of them with the owners' code
@pytest.mark.parametrize("name", export.FORMATS)
def test_evaluate_reads_each_format_back(name, kind, tmp_path):
    config = replace(TINY, interpolation="bilinear", **KINDS[kind])
    model = checkpoint(tmp_path / "last.pt", config)
    files = export.FORMATS[name](model, VOCABULARY, tmp_path / "out")
    out = write(files, tmp_path / "out")
    read_back(out, model, None if name == "timm" else VOCABULARY)
    if name == "hf":
        (out / "merges.txt").unlink()
        with pytest.raises(ValueError, match="merges.txt"):
            evaluate.load_model(out)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    words = [tmp_path / "none.pt", "--format", "hf", "--out", tmp_path / "x"]
    assert "pip install" in answer(export.main, words, monkeypatch, capsys)


VIT_B32 = replace(models.PRESETS["vit_b32"], method="clip", depth=2, text_depth=2)
SHAPES = [*(("tiny", kind) for kind in KINDS), ("vit_b32", "ours"), ("vit_b32", "openai")]
NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE).filter(ImageFilter.GaussianBlur(3))


def evaluation_pixels(config):
    """PICTURE as evaluate.py shows it to a model."""
    return data.normalize(torch.from_numpy(np.array(evaluate.evaluation_view(config)(PICTURE))))


def exported(name, shape, kind, tmp_path):
    """-> the model, its tokenizer (CLIP's, but for tiny), the folder"""
    pytest.importorskip("safetensors")
    config, tokenizer = (TINY, VOCABULARY) if shape == "tiny" else (VIT_B32, Tokenizer.clip())
    model = checkpoint(tmp_path / "last.pt", replace(config, **KINDS[kind]), tokenizer)
    export.export(tmp_path / "last.pt", name, tmp_path / "out")
    return model, tokenizer, tmp_path / "out"


@pytest.mark.peers
@pytest.mark.parametrize("shape,kind", SHAPES)
def test_timm_loads_it(shape, kind, tmp_path):
    timm = pytest.importorskip("timm")
    model, _, out = exported("timm", shape, kind, tmp_path)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = pictures(model.config)
    same(theirs.forward_features(images).detach(), model.visual(images).detach())
    view = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
    assert torch.allclose(view(PICTURE), evaluation_pixels(model.config), atol=1e-5)
    read_back(out, model)
    with pytest.raises(ValueError, match="exists"):
        export.export(tmp_path / "last.pt", "hf", out)
    with pytest.raises(ValueError, match="text"):  # the export has an image tower alone
        export.export(out, "hf", tmp_path / "new")


@pytest.mark.peers
@pytest.mark.parametrize("shape,kind", SHAPES)
def test_hugging_face_loads_it(shape, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer, out = exported("hf", shape, kind, tmp_path)
    theirs, info = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    context = model.config.context_length
    batch = transformers.CLIPTokenizer.from_pretrained(out)(
        TEXTS, padding=True, truncation=True, max_length=context, return_tensors="pt")
    tokens = tokenizer(TEXTS, context)
    assert torch.equal(batch["input_ids"] * batch["attention_mask"], tokens)
    images = pictures(model.config)
    with torch.no_grad():
        image = theirs.vision_model(images).pooler_output
        same(theirs.visual_projection(image), model.encode_image(images))
        text = theirs.text_model(**batch).pooler_output
        same(theirs.text_projection(text), model.encode_text(tokens))
    show = transformers.CLIPImageProcessor.from_pretrained(out)
    pixels = show(PICTURE, return_tensors="pt").pixel_values[0]
    assert (pixels - evaluation_pixels(model.config)).abs().mean() < 0.02  # another resampler
    read_back(out, model, tokenizer)


@pytest.mark.peers
@pytest.mark.parametrize("shape,kind", SHAPES)
def test_open_clip_loads_it(shape, kind, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    model, tokenizer, out = exported("open_clip", shape, kind, tmp_path)
    theirs, _, view = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    ours = tokenizer(TEXTS, model.config.context_length)
    for row, ids in zip(tokens, ours):
        end = (row == tokenizer.eot).int().argmax()
        assert torch.equal(row[:end + 1], ids[:end + 1])
    images = pictures(model.config)
    with torch.no_grad():
        same(theirs.encode_image(images), model.encode_image(images))
        same(theirs.encode_text(tokens), model.encode_text(ours))
    assert torch.allclose(view(PICTURE), evaluation_pixels(model.config), atol=1e-5)
    read_back(out, model, tokenizer)
