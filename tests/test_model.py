"""Attention, towers, masks, the six methods, the teacher.  Peers: test_weights.py."""
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, batch_of

import model as models
from model import METHODS, PRESETS, Teacher, build, ema_update

SHAPES = dict(image=(3, 16), text=(3, 16), scale=(), z1=(3, 8), z2=(3, 8), pixels=(3, 16, 192),
              student_logits=(3, 12, 12), mlm_logits=(2, 60))


def shaken(model):
    """Norms and biases too, so that no order of operations looks like another."""
    with torch.no_grad():
        for p in model.parameters():
            generator = torch.Generator().manual_seed(p.numel())
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [9, 3])
@pytest.mark.parametrize("how", ["all", "causal", "mask", "mask and causal"])
def test_attention_is_its_definition(how, rows, kind):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=g).requires_grad_() for _ in range(3))
    key_mask = torch.rand(2, 1, 1, 9, generator=g) < 0.5
    key_mask[..., 0] = True  # each query has a key
    arguments = dict(key_mask=key_mask if "mask" in how else None, causal="causal" in how)
    ours = models.attention(*(x.to(kind) for x in (q[:, :, :rows], k, v)), **arguments)
    expected = []
    for b in range(2):
        for i in range(rows):
            keys = [j for j in range(9) if ("mask" not in how or key_mask[b, 0, 0, j])
                    and ("causal" not in how or j <= i)]
            weight = (k[b, :, keys] @ q[b, :, i, :, None] / math.sqrt(8)).softmax(1)
            expected.append((weight * v[b, :, keys]).sum(1))
    expected = torch.stack(expected).view(2, rows, 4, 8).transpose(1, 2)
    tolerance = 1e-5 if kind == torch.float32 else 0.03
    assert ours.dtype == kind and torch.allclose(ours.float(), expected, atol=tolerance)
    weight = torch.randn(expected.shape, generator=g)
    of_ours, of_expected = (torch.autograd.grad((x.float() * weight).sum(), (q, k, v))
                            for x in (ours, expected))
    for a, b in zip(of_ours, of_expected, strict=True):
        assert torch.allclose(a, b, atol=2 * tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_passes_and_every_parameter_gets_a_gradient(method):
    config = replace(SMALL, method=method)
    model, batch = build(config), batch_of(config)
    out = model(batch)
    assert {name: tuple(x.shape) for name, x in out.items()} == {name: SHAPES[name] for name in out}
    by_passes = {}
    for name in model.passes:
        features = model(batch, [name], project=False)
        by_passes |= features if name == "masked" else model.project(features)
    assert by_passes.keys() == out.keys()
    assert all(torch.equal(x, by_passes[name]) for name, x in out.items())
    sum(x.float().square().sum() for x in out.values()).backward()  # what DDP asks of a step
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_each_view_has_its_own_z():
    model, batch = build(replace(SMALL, method="simclr")), batch_of(SMALL)
    out = model(batch)
    for i, name in enumerate(("z1", "z2")):
        cls = model.visual(batch["views"][:, i])[:, 0]
        assert torch.allclose(out[name], model.ssl_head(cls), atol=1e-5)


@pytest.mark.parametrize("rows", [slice(1), slice(2, 5)])
def test_rows_of_the_last_block_are_those_of_all(rows):
    visual, images = shaken(build(SMALL)).visual, batch_of(SMALL)["images"]
    some, every = visual(images, rows=rows), visual(images)[:, rows]
    assert torch.allclose(some, every, rtol=1e-4, atol=1e-5)
    of_some, of_every = (torch.autograd.grad(x.square().sum(), list(visual.parameters()))
                         for x in (some, every))
    for a, b in zip(of_some, of_every, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_image_decoder_puts_mask_tokens_where_patches_are_hidden():
    model, batch = shaken(build(SMALL)), batch_of(SMALL)
    keep, hide = batch["ids_keep"], batch["ids_hide"]
    f = model.visual(batch["images"], keep)
    decoder = model.image_decoder
    x = torch.cat([f, decoder.mask_token.expand(3, 12, -1)], 1)
    positions = torch.cat([torch.zeros(3, 1).long(), 1 + keep, 1 + hide], 1)
    expected = decoder.norm(decoder.blocks(x + decoder.pos_embed[positions]))[:, 5:]
    assert torch.allclose(decoder(f, keep, hide), expected, atol=1e-5)


def test_the_last_block_computes_no_rows_that_are_not_read():
    model, rows = build(SMALL), []
    for last in (model.visual.blocks[-1], model.image_decoder.blocks[-1]):
        last.mlp.register_forward_hook(lambda module, x, y: rows.append(y.size(1)))
    model(batch_of(SMALL), ["contrastive"])
    model(batch_of(SMALL), ["masked"])
    assert rows == [1, 1 + 4, 12]  # class token; it and the visible patches; hidden patches


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_recomputed_blocks_have_the_same_gradient(drop_path):
    model, batch = build(SMALL), batch_of(SMALL)
    for block in model.visual.blocks:
        block.drop_path = drop_path
    gradients = []
    for recompute in (False, True):
        models.set_up_blocks(model, recompute, compile=False)
        torch.manual_seed(1)
        model.zero_grad()
        sum(x.square().sum() for x in model(batch).values()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="clop"):
        build(replace(SMALL, method="clop"))


@pytest.mark.parametrize("method,name", [("maskclip", "student_logits"), ("clip_mae", "pixels")])
def test_hidden_pixels_do_not_reach_the_masked_pass(method, name):
    config = replace(SMALL, method=method)
    model, batch = build(config).eval(), batch_of(config)
    before = model(batch)
    changed, p = batch | dict(images=batch["images"].clone()), config.patch_size
    for b, ids in enumerate(batch["ids_hide"].tolist()):
        for k in ids:
            y, x = k // config.grid * p, k % config.grid * p
            changed["images"][b, :, y:y + p, x:x + p] += 5
    after = model(changed)
    assert torch.equal(before[name], after[name])
    assert not torch.allclose(before["image"], after["image"])  # the full pass sees them


def test_a_visible_patch_keeps_its_position():
    model, batch = build(SMALL).eval(), batch_of(SMALL)
    images, keep = batch["images"], batch["ids_keep"]
    f = model.visual(images, keep)
    everything = torch.arange(16).expand(3, -1)
    assert torch.allclose(model.visual(images, everything), model.visual(images), atol=1e-5)
    flipped = model.visual(images, keep.flip(1))  # each patch carries its position
    assert torch.allclose(f[:, 1:], flipped[:, 1:].flip(1), atol=1e-5)


def test_text_padding_and_what_follows_the_end_change_nothing():
    model = build(SMALL).eval()
    tokens = batch_of(SMALL)["tokens"]
    longer = torch.cat([tokens, torch.zeros(3, 5, dtype=torch.long)], 1)
    assert torch.allclose(model.encode_text(tokens), model.encode_text(longer), atol=1e-5)
    row = tokens[1:2]
    behind = torch.cat([row, torch.full((1, 1), SMALL.vocab_size - 1)], 1)  # [MASK], a larger id
    assert torch.allclose(model.encode_text(row), model.encode_text(behind), atol=1e-5)


def test_text_decoder_looks_both_ways_but_not_at_padding():
    model, batch = build(SMALL).eval(), batch_of(SMALL)

    def logits(tokens):
        return model(batch | dict(mlm_tokens=tokens))["mlm_logits"]

    tokens = batch["mlm_tokens"]
    later, padding = tokens.clone(), tokens.clone()
    later[0, 3] = (later[0, 3] + 1) % 50
    padding[0, 6] = 17  # behind the end of text 0
    assert not torch.allclose(logits(tokens)[0], logits(later)[0])
    assert torch.allclose(logits(tokens), logits(padding), atol=1e-5)


def test_patch_features_are_the_class_token_looking_at_one_patch():
    """The class token's mask shows it patch i alone from block l on; patches see all."""
    model = build(SMALL).eval()
    images = batch_of(SMALL)["images"]
    features = model.encode_patches(images)
    for i in range(16):
        views = []
        for start in range(SMALL.depth):
            x = model.visual.embed(images)
            cls = x[:, :1]
            for number, block in enumerate(model.visual.blocks):
                cls = x[:, :1] if number <= start else cls
                only = torch.zeros(3, 17, dtype=torch.bool)
                only[:, 1 + i] = True
                cls = block(torch.cat([cls, x[:, 1:]], 1), key_mask=only)[:, :1]
                x = block(x)
            view = model.image_projection(model.visual.norm(cls[:, 0]))
            views.append(F.normalize(view, dim=-1))
        assert torch.allclose(features[:, i], torch.stack(views).mean(0), atol=1e-5)


def test_teacher_has_no_gradient_sees_all_and_follows_the_formula():
    student, batch = build(SMALL), batch_of(SMALL)
    teacher, hide = Teacher(student), batch["ids_hide"]
    logits = teacher(batch["images"], hide)
    assert logits.shape == (3, 12, 12) and not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    every = teacher.codewords(teacher.visual(batch["images"])[:, 1:])
    for b in range(3):  # row m is patch ids_hide[b, m], as the student's
        assert torch.allclose(logits[b], every[b, hide[b]], atol=1e-6)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    before, skipping, counting = (copy.deepcopy(teacher) for _ in range(3))
    ema_update(teacher, student, 0.9)
    ema_update(skipping, student, 0.9, finite=torch.tensor(False))
    ema_update(counting, student, 0.9, finite=torch.tensor(True))
    of_student, of_skipping = dict(student.named_parameters()), dict(skipping.named_parameters())
    for (name, new), old in zip(teacher.named_parameters(), before.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * of_student[name], atol=1e-6), name
        assert torch.equal(of_skipping[name], old)
        assert torch.equal(counting.get_parameter(name), new)


def test_the_same_seed_gives_shared_parts_the_same_weights():
    """So that methods can be compared, and checkpoints go from one to the other."""
    def weights(method, seed=0):
        torch.manual_seed(seed)
        return build(replace(SMALL, method=method)).state_dict()

    clip = weights("clip")
    for method in ("slip", "clip_mae", "maskclip"):
        other = weights(method)
        assert all(torch.equal(p, other[name]) for name, p in clip.items()), method
    mae = weights("mae")
    assert all(torch.equal(p, clip[name]) for name, p in mae.items() if name.startswith("visual."))
    assert not torch.equal(clip["visual.pos_embed"], weights("clip", 1)["visual.pos_embed"])


@pytest.mark.parametrize("method", ["clip", "slip", "clip_mae", "maskclip"])
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow),
                                    pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_vit_b16_step(method, device):
    config = replace(PRESETS["vit_b16"], method=method)
    model = build(config).to(device)
    batch = {name: x.to(device) for name, x in batch_of(config, n=2, hidden=147).items()}
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        out = model(batch)
    sum(x.float().square().mean() for x in out.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
