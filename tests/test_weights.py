"""Other projects' weights give the features that their own code gives; no code in a file runs."""
import argparse
import hashlib
import importlib.util
import json
import pickle
import sys
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
from helpers import SMALL

import model as models
from data import IMAGENET_MEAN, IMAGENET_STD, normalize
from evaluate import load_model, zeroshot_classifier
from support.weights import CLIP_MEAN, CLIP_STD, read_weights, take_weights
from tokenizer import Tokenizer

PIXELS = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
TEXTS = ["a dog", "two teddy bears in the snow, seen from afar"]


def shaken(module):
    """Random weights, also where they start as 0 or 1: a bias that is lost would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return module.eval()


def equal_features(path, image, text, tokens):
    """load_model(path) gives these features of PIXELS and TEXTS.  -> model, tokenizer"""
    model, tokenizer = load_model(path)
    ids = tokenizer(TEXTS, 77)
    assert torch.equal(ids, tokens[:, :ids.size(1)])
    with torch.no_grad():
        assert image.std() > 0.01
        assert torch.allclose(model.encode_image(normalize(PIXELS)), image, atol=1e-4)
        assert torch.allclose(model.encode_text(ids), text, atol=1e-4)
    return model, tokenizer


def small_clip(**vision):
    """open_clip's CLIP with a small text tower and QuickGELU; its numbers fit half precision."""
    open_clip = pytest.importorskip("open_clip")
    vision = dict(image_size=224, patch_size=32, width=128, layers=2) | vision
    text = open_clip.CLIPTextCfg(width=64, heads=1, layers=2)
    model = shaken(open_clip.CLIP(32, open_clip.CLIPVisionCfg(**vision), text, quick_gelu=True))
    for p in model.parameters():
        p.data = p.data.half().float()
    return model


def features_of(clip):
    """-> open_clip's features of PIXELS and TEXTS, and tokens"""
    tokens = Tokenizer.clip()(TEXTS)
    tokens = torch.nn.functional.pad(tokens, (0, 77 - tokens.size(1)))
    with torch.no_grad():
        image = clip.encode_image(normalize(PIXELS, CLIP_MEAN, CLIP_STD))
        return image, clip.encode_text(tokens), tokens


# ---------------------------------------------------------------- other projects' features

@pytest.mark.peers
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_open_clip_s_weights(name, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    theirs = shaken(open_clip.create_model(name))
    image, text, _ = features_of(theirs)
    path = tmp_path / "weights.pt"
    state = {f"module.{key}": x for key, x in theirs.state_dict().items()}
    torch.save(dict(state_dict=state, epoch=3), path)
    quick = "quickgelu" in name
    if quick:  # the folder says what the file does not
        path.rename(tmp_path / "open_clip_pytorch_model.bin")
        path = tmp_path
        view = dict(mean=CLIP_MEAN, std=CLIP_STD, interpolation="bilinear")
        (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(
            model_cfg=open_clip.get_model_config(name), preprocess_cfg=view)))
    model, tokenizer = equal_features(path, image, text, open_clip.get_tokenizer(name)(TEXTS))
    assert model.config.method == "clip" and len(model.notes) == (0 if quick else 1)
    assert model.config.interpolation == ("bilinear" if quick else "bicubic")
    classes = ["dog", "pink primrose", "F-16A/B"]
    templates = ["a photo of a {}.", "art of the {}."]
    classifier = zeroshot_classifier(model, tokenizer, classes, templates)
    reference = open_clip.build_zero_shot_classifier(
        theirs, open_clip.get_tokenizer(name), classes,
        [lambda name, template=template: template.replace("{}", name) for template in templates], 2)
    assert torch.allclose(classifier, reference.T, atol=1e-5)


@pytest.mark.peers
def test_open_clip_s_model_with_timm_s_tower(tmp_path):
    theirs = small_clip(timm_model_name="vit_tiny_patch16_224", timm_pool="token",
                        timm_proj="linear")
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    model, _ = equal_features(tmp_path, *features_of(theirs))
    assert model.config.heads == 3 and model.config.quick_gelu == (False, True)


@pytest.mark.peers
def test_openai_s_download_is_read_without_running_its_program(tmp_path):
    """A TorchScript archive of OpenAI's model in half precision, and its state dict."""
    theirs = small_clip()
    image, text, tokens = features_of(theirs)
    half = PIXELS.movedim(-1, 1).half()
    traced = torch.jit.trace(theirs.half(), (half, tokens), check_trace=False)
    traced.save(tmp_path / "ViT-B-32.pt")
    state = dict(traced.state_dict()) | {"input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "state.pt")
    for name in ("ViT-B-32.pt", "state.pt"):
        model, _ = equal_features(tmp_path / name, image, text, tokens)
        assert model.config.quick_gelu == (True, True) and not model.notes


@pytest.mark.peers
@pytest.mark.parametrize("act,form", [("quick_gelu", "folder"), ("gelu", "bin"),
                                      ("quick_gelu", "file")])
def test_hugging_face_s_clip(act, form, tmp_path):
    transformers = pytest.importorskip("transformers")
    heads, width = (2, 128) if form == "file" else (3, 96)  # a file alone: heads of 64
    vision = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
                  num_attention_heads=heads, patch_size=32, hidden_act=act)
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
                hidden_act=act)
    theirs = shaken(transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=48)))
    mean, std = CLIP_MEAN, CLIP_STD
    path = tmp_path
    theirs.save_pretrained(tmp_path)
    if form == "bin":
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(
            dict(image_mean=mean, image_std=std, resample=2)))  # 2 is Pillow's bilinear
    if form == "file":
        path = (tmp_path / "model.safetensors").rename(tmp_path / "clip.safetensors")
    tokens = Tokenizer.clip()(TEXTS)
    with torch.no_grad():
        pooled = theirs.vision_model(normalize(PIXELS, mean, std)).pooler_output
        hidden = theirs.text_model(tokens).last_hidden_state
        ends = hidden[torch.arange(2), (tokens == 49407).int().argmax(1)]
        model, _ = equal_features(path, theirs.visual_projection(pooled),
                                  theirs.text_projection(ends), tokens)
    assert len(model.notes) == (1 if form == "file" else 0)
    assert model.config.interpolation == ("bilinear" if form == "bin" else "bicubic")


@pytest.mark.peers
@pytest.mark.parametrize("method", ["clip", "slip", "simclr"])
def test_slip_s_released_files(method, tmp_path):
    """Keys and contents as SLIP's main.py saves them, an argparse.Namespace among these."""
    timm = pytest.importorskip("timm")
    words = small_clip()
    _, text, tokens = features_of(words)
    visual = shaken(timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0,
                                      depth=2))
    projection = torch.randn(384, 32, generator=torch.Generator().manual_seed(1)) * 384 ** -0.5
    state = {f"module.visual.{name}": x for name, x in visual.state_dict().items()}
    if method != "simclr":
        state |= {f"module.{name}": x for name, x in words.state_dict().items()
                  if not name.startswith("visual.")}
        state["module.image_projection"] = projection
    if method != "clip":
        state["module.image_mlp.layer1.weight"] = torch.zeros(4, 384)
    torch.save(dict(epoch=25, state_dict=state, best_acc1=42.8, args=argparse.Namespace(lr=3e-3)),
               tmp_path / "slip.pt")
    with torch.no_grad():
        features = visual(normalize(PIXELS))
        if method == "simclr":
            model, tokenizer = load_model(tmp_path / "slip.pt")
            assert tokenizer is None
            assert torch.allclose(model.visual(normalize(PIXELS))[:, 0], features, atol=1e-4)
        else:
            model, _ = equal_features(tmp_path / "slip.pt", features @ projection, text, tokens)
    config = model.config
    assert (config.method, config.interpolation, config.heads) == (method, "bilinear", 12)


@pytest.mark.peers
@pytest.mark.parametrize("form", ["mae", "timm"])
def test_vits_of_timm_and_mae(form, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = shaken(timm.create_model("vit_base_patch16_224", depth=2))
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if form == "mae":
        path = tmp_path / "weights.pth"
        decoder = {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(1)}
        torch.save(dict(model=theirs.state_dict() | decoder, args=argparse.Namespace(lr=1)), path)
    else:
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        path = tmp_path
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
        view = dict(mean=mean, std=std, interpolation="bilinear")
        (tmp_path / "config.json").write_text(json.dumps(dict(pretrained_cfg=view)))
    model, tokenizer = load_model(path)
    assert tokenizer is None and model.config.method == ("mae" if form == "mae" else "vit")
    assert model.config.interpolation == ("bilinear" if form == "timm" else "bicubic")
    with torch.no_grad():
        expected = theirs.forward_features(normalize(PIXELS, mean, std))
        assert torch.allclose(model.visual(normalize(PIXELS)), expected, atol=1e-4)


# ---------------------------------------------------------------- our checkpoints

def test_our_checkpoints(tmp_path):
    """One of train.py, one of downstream/ without a tokenizer; --init takes them."""
    config = replace(SMALL, method="clip")
    model = models.build(config)
    facts = dict(model=model.state_dict(), model_config=asdict(config))
    torch.save(facts | dict(tokenizer=["a b", "ab c"]), tmp_path / "last.pt")
    weights = read_weights(tmp_path / "last.pt")
    assert (weights["config"], weights["tokenizer"]) == (config, ["a b", "ab c"])
    assert all(torch.equal(x, weights["model"][name]) for name, x in facts["model"].items())
    other = models.build(replace(config, method="clip_mae"))
    note = take_weights(other, weights, "--init last.pt")
    assert torch.equal(other.visual.cls_token, model.visual.cls_token) and "fresh" in note
    for change, word in ((dict(depth=3), "blocks"), (dict(width=64), "size")):
        with pytest.raises(ValueError, match=word):
            take_weights(models.build(replace(config, **change)), weights, "--init last.pt")

    head = {"head.weight": torch.zeros(3, config.width)}
    torch.save(facts | dict(model=facts["model"] | head), tmp_path / "last.pt")
    weights = read_weights(tmp_path / "last.pt")
    assert weights["config"].method == "vit" and "head" in weights["notes"][0]
    assert all(name.startswith("visual.") for name in weights["model"])


# ---------------------------------------------------------------- files that are wrong

VIT = {name.removeprefix("visual."): x
       for name, x in models.build(replace(SMALL, method="simclr")).state_dict().items()
       if name.startswith("visual.")}


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_program_is_not_run(tmp_path, capfd):
    path = tmp_path / "program.pt"
    call = b"system\n(S'echo this must not run'\ntR."
    for pickled in (pickle.dumps(Evil()), b"c__torch__.os\n" + call, b"cos\n" + call, b"", b"no"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x/data.pkl", pickled)
            file.writestr("x/constants.pkl", b"")
        with pytest.raises(ValueError, match="program.pt (is no|would run)"):
            read_weights(path)
    torch.save(dict(state_dict=dict(x=torch.ones(1)), args=Evil()), path)
    with pytest.raises(ValueError, match="would run"):
        read_weights(path)
    assert "this must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("wrap,prefix,note", [
    (lambda x: x, "_orig_mod.", ""), (lambda x: dict(state_dict=x), "module._orig_mod.", ""),
    (lambda x: dict(model_state_dict=x, epoch=1), "model.", ""),
    (lambda x: dict(model_ema=x), "clip_model.", ""), (lambda x: dict(state_dict_ema=x), "", ""),
    (lambda x: dict(student={}, teacher=x), "backbone.", "teacher is taken")])
def test_what_scripts_wrap_around_weights(tmp_path, wrap, prefix, note):
    state = wrap({prefix + name: x for name, x in VIT.items()})
    torch.save(state, tmp_path / "vit.pt")
    weights = read_weights(tmp_path / "vit.pt")
    assert torch.equal(weights["model"]["visual.pos_embed"], VIT["pos_embed"])
    assert note in " ".join(weights["notes"])
    assert weights["sha256"] == hashlib.sha256((tmp_path / "vit.pt").read_bytes()).hexdigest()


def test_weights_in_several_parts(tmp_path):
    names = list(VIT)
    parts = {"a-00001.bin": names[:9], "a-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: VIT[name] for name in part}, tmp_path / file)
    index = dict(weight_map={name: file for file, part in parts.items() for name in part})
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert read_weights(tmp_path)["model"].keys() == {f"visual.{name}" for name in VIT}
    (tmp_path / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(ValueError, match="index.json"):
        read_weights(tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize("part,key,value", [
    ("vision_cfg", "pool_type", "avg"), ("text_cfg", "no_causal_mask", True),
    ("text_cfg", "pool_type", "last"), ("vision_cfg", "norm_kwargs", dict(eps=1e-6))])
def test_settings_of_open_clip_that_would_give_other_features(tmp_path, part, key, value):
    torch.save(small_clip().state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    towers = dict(quick_gelu=True, vision_cfg=dict(width=128, head_width=32), text_cfg={})
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps(dict(model_cfg=towers)))
    assert read_weights(tmp_path)["config"].heads == 4
    towers[part] = {key: value}
    file.write_text(json.dumps(dict(model_cfg=towers)))
    with pytest.raises(ValueError, match=f"{key}.*not supported"):
        read_weights(tmp_path)
    squash = dict(model_cfg={}, preprocess_cfg=dict(resize_mode="squash"))
    file.write_text(json.dumps(squash))
    with pytest.raises(ValueError, match="resize_mode"):
        read_weights(tmp_path)


@pytest.mark.parametrize("file,settings,key", [
    ("config.json", dict(model_args=dict(act_layer="relu")), "act_layer"),
    ("config.json", dict(pretrained_cfg=dict(crop_mode="squash")), "crop_mode")])
def test_settings_of_timm_that_would_give_other_features(tmp_path, file, settings, key):
    torch.save(VIT, tmp_path / "pytorch_model.bin")
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{key}.*not supported"):
        read_weights(tmp_path)


def test_tensors_that_are_not_used_are_named(tmp_path):
    torch.save(VIT | {"adapter.fc.weight": torch.ones(2, 2)}, tmp_path / "vit.pt")
    assert "left out: adapter" in " ".join(read_weights(tmp_path / "vit.pt")["notes"])


@pytest.mark.peers
def test_the_name_of_a_file_can_say_quickgelu(tmp_path):
    theirs = small_clip()
    for name, quick in (("ViT-X.pt", False), ("ViT-X-quickgelu.pt", True)):
        torch.save(theirs.state_dict(), tmp_path / name)
        weights = read_weights(tmp_path / name)
        assert weights["config"].quick_gelu == (quick, quick)
        assert bool(weights["notes"]) == (not quick)


def test_safetensors(tmp_path, monkeypatch):
    """Damaged, and without the package."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\2\0\0\0\0\0\0\0[]")
    if importlib.util.find_spec("safetensors"):
        with pytest.raises(ValueError, match="x.safetensors.*damaged"):
            read_weights(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        read_weights(path)


@pytest.mark.parametrize("state,word", [
    (dict(weights=torch.ones(1)), "its first tensors are weights"),
    (dict(net=dict(a=1), epoch=3), "none of a tensor, are net, epoch"),
    ({name: x for name, x in VIT.items() if name != "pos_embed"}, "absolute positions"),  # BEiT
    (VIT | {"blocks.0.ls1.gamma": torch.zeros(32)}, "ls1.gamma"),                       # DINOv2
    (VIT | {"pos_embed": torch.zeros(1, 16, 32)}, "pos_embed"),         # without the class token
    (dict(model_config=dict(odd=1), model={}), "odd"), (7, "none"), (b"", ""), (b"no check", ""),
    (b"x" * 46 + b"PK\5\6\0\0\0\0\1\0\1\0\x2e" + bytes(9), "")])  # a damaged zip's end
def test_a_state_that_is_wrong(state, word, tmp_path):
    torch.save(state, tmp_path / "odd.pt")
    if isinstance(state, bytes):
        (tmp_path / "odd.pt").write_bytes(state)
    with pytest.raises(ValueError, match=f"odd.pt.*{word}"):
        read_weights(tmp_path / "odd.pt")


def test_settings_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        read_weights(tmp_path)
    torch.save(VIT, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path)["config"].grid == 4
    for content in ("{", "[1]", '{"pretrained_cfg": {"mean": "x"}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=str(tmp_path)):
            read_weights(tmp_path)
