"""Exports against their owners' code, and read back: equal features, token ids, names."""
import dataclasses
import io
import sys
from dataclasses import replace
from types import SimpleNamespace

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
TINY = replace(models.PRESETS["tiny"], method="clip", interpolation="bilinear")
VIT_B32 = replace(models.PRESETS["vit_b32"], method="clip", depth=2, text_depth=2)
KINDS = {"ours": {}, "12 heads": dict(width=96, heads=12),
         "quick images": dict(quick_gelu=(True, False)),
         "openai": dict(quick_gelu=(True, True), pre_norm=True, image_norm_eps=1e-5)}
VOCABULARY = Tokenizer.train(TEXTS + ["a photo of a red circle", "a blue star, a red dog"] * 3, 600)
NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE).filter(ImageFilter.GaussianBlur(3))


def exported(name, config, tokenizer, tmp_path):
    """Export random weights (all random, so that none can be lost unseen) -> the model, folder"""
    model = models.build(replace(config, vocab_size=len(tokenizer)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    merges = [" ".join(pair) for pair in tokenizer.merges]
    torch.save(dict(model_config=dataclasses.asdict(model.config), model=model.state_dict(),
                    tokenizer=merges), tmp_path / "last.pt")
    export.export(tmp_path / "last.pt", name, tmp_path / "out")
    return model.eval().requires_grad_(False), tmp_path / "out"


def pictures(config):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, config.image_size, config.image_size, generator=generator)


def same(ours, theirs):
    assert ours.shape == theirs.shape and theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def evaluation_pixels(config):
    """PICTURE as evaluate.py shows it to a model."""
    return data.normalize(torch.from_numpy(np.array(evaluate.evaluation_view(config)(PICTURE))))


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", export.FORMATS)
def test_evaluate_reads_each_format_back(name, kind, tmp_path, monkeypatch):
    def save(weights, _):  # as bytes that need no package
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        return buffer.getvalue()
    monkeypatch.setitem(sys.modules, "safetensors.torch", SimpleNamespace(save=save))
    model, out = exported(name, replace(TINY, **KINDS[kind]), VOCABULARY, tmp_path)
    for path in out.glob("*model.safetensors"):
        path.rename(f"{path}".replace("model.safetensors", "pytorch_model.bin"))
    read_back(out, model, None if name == "timm" else VOCABULARY)
    with pytest.raises(ValueError, match="exists"):
        export.export(tmp_path / "last.pt", name, out)
    if name == "timm":  # an image tower alone
        with pytest.raises(ValueError, match="text"):
            export.export(out, "hf", tmp_path / "new")


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    words = [tmp_path / "none.pt", "--format", "hf", "--out", tmp_path / "x"]
    assert "pip install" in answer(export.main, words, monkeypatch, capsys)


@pytest.fixture(params=[*KINDS, "vit_b32"])
def shape(request):
    """-> a model's config, its tokenizer"""
    pytest.importorskip("safetensors")
    if request.param == "vit_b32":
        return VIT_B32, Tokenizer.clip()
    return replace(TINY, **KINDS[request.param]), VOCABULARY


@pytest.mark.peers
def test_timm_loads_it(shape, tmp_path):
    timm = pytest.importorskip("timm")
    model, out = exported("timm", *shape, tmp_path)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = pictures(model.config)
    same(theirs.forward_features(images).detach(), model.visual(images))
    view = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
    assert torch.allclose(view(PICTURE), evaluation_pixels(model.config), atol=1e-5)
    read_back(out, model)


@pytest.mark.peers
@torch.no_grad()
def test_hugging_face_loads_it(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, out = exported("hf", *shape, tmp_path)
    theirs, info = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    context = model.config.context_length
    batch = transformers.CLIPTokenizer.from_pretrained(out)(
        TEXTS, padding=True, truncation=True, max_length=context, return_tensors="pt")
    tokens = shape[1](TEXTS, context)
    assert torch.equal(batch["input_ids"] * batch["attention_mask"], tokens)
    images = pictures(model.config)
    image = theirs.vision_model(images).pooler_output
    same(theirs.visual_projection(image), model.encode_image(images))
    text = theirs.text_model(**batch).pooler_output
    same(theirs.text_projection(text), model.encode_text(tokens))
    show = transformers.CLIPImageProcessor.from_pretrained(out)
    pixels = show(PICTURE, return_tensors="pt").pixel_values[0]
    assert (pixels - evaluation_pixels(model.config)).abs().mean() < 0.02  # another resampler
    for half in (transformers.CLIPVisionModelWithProjection,
                 transformers.CLIPTextModelWithProjection):
        _, info = half.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], info
    read_back(out, model, shape[1])


@pytest.mark.peers
@torch.no_grad()
def test_open_clip_loads_it(shape, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    model, out = exported("open_clip", *shape, tmp_path)
    theirs, _, view = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    ours = shape[1](TEXTS, model.config.context_length)
    for row, ids in zip(tokens, ours):
        end = (row == shape[1].eot).int().argmax()
        assert torch.equal(row[:end + 1], ids[:end + 1])
    images = pictures(model.config)
    same(theirs.encode_image(images), model.encode_image(images))
    same(theirs.encode_text(tokens), model.encode_text(ours))
    assert torch.allclose(view(PICTURE), evaluation_pixels(model.config), atol=1e-5)
    read_back(out, model, shape[1])
