"""Towers, masks, the six methods, the teacher; timm's ViT with the same weights (peers)."""
import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as models
from model import METHODS, PRESETS, Teacher, build, ema_update

SMALL = replace(PRESETS["tiny"], image_size=32, width=32, depth=2, heads=4, embed_dim=16, vocab_size=60, text_width=32,
                text_depth=2, text_heads=4, codewords=12, ssl_hidden=16, ssl_dim=8)  # 16 patches


def batch_of(config, n=3, length=7, hidden=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, config.image_size, config.image_size, generator=g)
    order = torch.rand(n, config.grid ** 2, generator=g).argsort(1)
    tokens = torch.randint(1, config.vocab_size - 3, (n, length), generator=g)
    tokens[:, 0], tokens[:, -1] = config.vocab_size - 3, config.vocab_size - 2
    tokens[0, -3:] = torch.tensor([config.vocab_size - 2, 0, 0])  # a shorter text
    ids = torch.tensor([1, length + 2])
    masked = tokens.flatten().index_fill(0, ids, config.vocab_size - 1).view_as(tokens)
    return dict(images=images, views=torch.randn(n, 2, *images.shape[1:], generator=g), tokens=tokens,
                ids_hide=order[:, :hidden].sort().values, ids_keep=order[:, hidden:].sort().values,
                mlm_tokens=masked, mlm_ids=ids, mlm_targets=tokens.flatten()[ids])


def test_vit_b16_has_timms_size_and_the_text_tower_clips():
    with torch.device("meta"):
        model = METHODS["clip"](PRESETS["vit_b16"])
    assert sum(p.numel() for p in model.visual.parameters()) == 85_798_656
    blocks, tokens, positions, norm = 12 * 3_152_384, 49_409 * 512, 77 * 512, 2 * 512  # CLIP's, and a row for [MASK]
    assert sum(p.numel() for p in model.text.parameters()) == blocks + tokens + positions + norm
    assert model.text_projection.weight.shape == (512, 512)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_every_parameter_gets_a_gradient(method):
    config = replace(SMALL, method=method)
    model, batch = build(config), batch_of(config)
    out = model(batch)
    shapes = dict(image=(3, 16), text=(3, 16), scale=(), z1=(3, 8), z2=(3, 8), pixels=(3, 16, 192),
                  student_logits=(3, 12, 12), mlm_logits=(2, 60))
    assert {name: tuple(x.shape) for name, x in out.items()} == {name: shapes[name] for name in out}
    sum(x.float().square().sum() for x in out.values()).backward()  # what DDP asks of a step
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_each_view_has_its_own_z():
    model, batch = build(replace(SMALL, method="simclr")), batch_of(SMALL)
    out = model(batch)
    for name, view in (("z1", batch["views"][:, 0]), ("z2", batch["views"][:, 1])):
        assert torch.allclose(out[name], model.ssl_head(model.visual(view)[:, 0]), atol=1e-5)
    assert not torch.allclose(out["z1"], out["z2"], atol=0.1)


def shaken(model):
    """Norms and biases too, so that no order of operations looks like another."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.mark.parametrize("rows", [slice(1), slice(1, None), slice(2, 5)])
def test_rows_of_the_last_block_are_those_of_the_whole(rows):
    model, batch = shaken(build(replace(SMALL, method="maskclip"))), batch_of(SMALL)

    def both(compute):
        model.zero_grad()
        x = compute()
        x.square().sum().backward()
        return [x.detach(), *(p.grad.clone() for p in model.visual.parameters())]
    for inputs in ((batch["images"],), (batch["images"], batch["ids_keep"])):
        some = both(partial(model.visual, *inputs, rows=rows))
        whole = both(lambda inputs=inputs: model.visual(*inputs)[:, rows])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(some, whole, strict=True))
    decoder, keep, hide = model.image_decoder, batch["ids_keep"], batch["ids_hide"]
    f = model.visual(batch["images"], keep)
    x = torch.cat([f, decoder.mask_token.expand(3, 12, -1)], 1) + decoder.pos_embed[
        torch.cat([torch.zeros(3, 1).long(), 1 + keep, 1 + hide], 1)]
    assert torch.allclose(decoder(f, keep, hide), decoder.norm(decoder.blocks(x))[:, 5:], atol=1e-5)


def test_the_last_block_computes_no_rows_that_are_not_read():
    model, batch = build(replace(SMALL, method="maskclip")), batch_of(SMALL)

    def flops(compute):
        with FlopCounterMode(display=False) as counter:
            compute()
        return counter.get_total_flops()
    token = 2 * 9 * 32 ** 2 * 3  # projection and MLP of a token in each of 3 pictures; attention itself is not counted
    images, f = batch["images"], model.visual(batch["images"], batch["ids_keep"])
    assert flops(lambda: model.visual(images)) - flops(lambda: model.visual(images, rows=slice(1))) == 16 * token
    projection = 2 * 32 * 16 * 3
    assert flops(lambda: model.encode_image(images)) - projection == flops(lambda: model.visual(images, rows=slice(1)))
    full = replace(SMALL, depth=1)  # a block over all 17 tokens of the decoder, with nothing before it
    assert flops(lambda: models.ViT(full).blocks(torch.zeros(3, 17, 32))) - flops(
        lambda: model.image_decoder(f, batch["ids_keep"], batch["ids_hide"])) == 5 * token


@pytest.mark.parametrize("rows", [slice(None), slice(3)])
@pytest.mark.parametrize("what", ["all", "causal", "mask"])
def test_attention_in_bfloat16_on_the_cpu_is_its_definition(what, rows):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=g).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, 1, 9).bool()
    mask[0, ..., 5:] = False
    how = dict(all={}, causal=dict(causal=True), mask=dict(mask=mask))[what]
    with torch.autocast("cpu", torch.bfloat16):
        ours = models.attention(*(x.bfloat16() for x in (q[:, :, rows], k, v)), **how)
    theirs = F.scaled_dot_product_attention(q[:, :, rows], k, v, how.get("mask"), is_causal=what == "causal")
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours.float(), theirs, atol=0.02)
    weight = torch.randn(theirs.shape, generator=g)
    of_ours, of_theirs = (torch.autograd.grad((x.float() * weight).sum(), (q, k, v)) for x in (ours, theirs))
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(of_ours, of_theirs, strict=True))


def test_all_patches_are_distilled_in_one_order_by_student_and_teacher():
    batch = batch_of(SMALL)
    torch.manual_seed(0)
    hidden = shaken(build(replace(SMALL, method="maskclip")))
    everything = build(replace(SMALL, method="maskclip", distill="all"))
    everything.load_state_dict(hidden.state_dict())
    few, many = hidden.masked(batch)["student_logits"], everything.masked(batch)["student_logits"]
    assert many.shape == (3, 16, 12) and torch.allclose(many[:, 4:], few, atol=1e-5)  # the visible ones come first
    ids, teacher = everything.distilled(batch), Teacher(hidden)
    assert ids.sort(1).values.tolist() == [list(range(16))] * 3
    assert torch.equal(teacher(batch["images"], ids)[:, 4:], teacher(batch["images"], hidden.distilled(batch)))
    decoder, keep, hide = everything.image_decoder, batch["ids_keep"], batch["ids_hide"]
    x = torch.cat([everything.visual(batch["images"], keep), decoder.mask_token.expand(3, 12, -1)], 1)
    x = decoder.blocks(x + decoder.pos_embed[torch.cat([torch.zeros(3, 1).long(), 1 + keep, 1 + hide], 1)])
    assert torch.allclose(many, everything.codewords(decoder.norm(x[:, 1:])), atol=1e-5)


def test_unknown_method_and_patch_size_are_refused():
    with pytest.raises(ValueError, match="unknown method 'clop'"):
        build(replace(SMALL, method="clop"))
    with pytest.raises(ValueError, match="not a multiple"):
        build(replace(SMALL, patch_size=7))


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


def test_a_visible_patch_reaches_the_masked_pass_at_its_own_place():
    model = build(SMALL).eval()
    batch = batch_of(SMALL)
    seen = model.visual(batch["images"], batch["ids_keep"])
    assert seen.shape == (3, 1 + 4, 32)
    everything = torch.arange(16).expand(3, -1)
    assert torch.allclose(model.visual(batch["images"], everything), model.visual(batch["images"]), atol=1e-5)
    # the order in which patches are handed over does not matter, for each carries its position
    flipped = model.visual(batch["images"], batch["ids_keep"].flip(1))
    assert torch.allclose(seen[:, 1:], flipped[:, 1:].flip(1), atol=1e-5)


def test_text_padding_and_what_follows_the_end_change_nothing():
    model = build(SMALL).eval()
    tokens = batch_of(SMALL)["tokens"]
    longer = torch.cat([tokens, torch.zeros(3, 5, dtype=torch.long)], 1)
    assert torch.allclose(model.encode_text(tokens), model.encode_text(longer), atol=1e-5)
    row = tokens[1:2]
    mask_behind = torch.cat([row, torch.full((1, 1), SMALL.vocab_size - 1)], 1)  # an id above end-of-text
    assert torch.allclose(model.encode_text(row), model.encode_text(mask_behind), atol=1e-5)


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
    """Against attention whose mask lets the class token see patch i alone from block l on, and patches see all."""
    model = build(SMALL).eval()
    images = batch_of(SMALL)["images"]
    features = model.encode_patches(images)
    assert features.shape == (3, 16, 16)
    for i in range(16):
        views = []
        for start in range(SMALL.depth):
            x = model.visual.embed(images)
            cls = x[:, :1]
            for number, block in enumerate(model.visual.blocks):
                cls = x[:, :1] if number <= start else cls
                only = torch.zeros(3, 17, dtype=torch.bool)
                only[:, 1 + i] = True
                x, cls = block(x), block(torch.cat([cls, x[:, 1:]], 1), key_mask=only)[:, :1]
            views.append(F.normalize(model.image_projection(model.visual.norm(cls[:, 0])), dim=-1))
        assert torch.allclose(features[:, i], torch.stack(views).mean(0), atol=1e-5)


def test_teacher_gets_no_gradient_and_follows_the_formula():
    student = build(SMALL)
    teacher = Teacher(student)
    batch = batch_of(SMALL)
    logits = teacher(batch["images"], batch["ids_hide"])
    assert logits.shape == (3, 12, 12) and not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    full = teacher.codewords(teacher.visual(batch["images"])[:, 1:])  # it sees the full image
    assert torch.equal(logits[1, 0], full[1, batch["ids_hide"][1, 0]])
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    before = copy.deepcopy(teacher)
    ema_update(teacher, student, 0.9)
    of_student = dict(student.named_parameters())
    for (name, new), old in zip(teacher.named_parameters(), before.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * of_student[name], atol=1e-6), name
    assert {name.split(".")[0] for name, _ in teacher.named_parameters()} == {"visual", "codewords"}


def test_the_same_seed_gives_shared_parts_the_same_weights():
    """So that methods can be compared at equal seeds: CLIP's parts start equal in all that hold them."""
    def weights(method, seed=0):
        torch.manual_seed(seed)
        return build(replace(SMALL, method=method)).state_dict()
    clip = weights("clip")
    for method in ("slip", "clip_mae", "maskclip"):
        assert all(torch.equal(p, weights(method)[name]) for name, p in clip.items()), method
    assert all(torch.equal(p, weights("mae")[name]) for name, p in clip.items() if name.startswith("visual."))
    assert not torch.equal(clip["visual.pos_embed"], weights("clip", 1)["visual.pos_embed"])


def test_weight_layout_does_not_depend_on_the_method():
    """CLIP's part of each method has CLIP's names, so that checkpoints go from one to the other."""
    names = set(build(replace(SMALL, method="clip")).state_dict())
    for method in ("slip", "clip_mae", "maskclip"):
        assert names <= set(build(replace(SMALL, method=method)).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_vit_b16_step_on_cpu(method):
    config = replace(PRESETS["vit_b16"], method=method)
    model = build(config)
    out = model(batch_of(config, n=2, hidden=147))
    sum(x.float().square().mean() for x in out.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_vit_b16_step_on_cuda_in_bf16(method):
    config = replace(PRESETS["vit_b16"], method=method)
    model = build(config).cuda()
    batch = {name: x.cuda() for name, x in batch_of(config, n=4, hidden=147).items()}
    with torch.autocast("cuda", torch.bfloat16):
        out = model(batch)
    sum(x.float().square().mean() for x in out.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.peers
def test_visual_equals_timm_with_the_same_weights():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    ours = models.ViT(PRESETS["vit_b16"]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs.forward_features(images), atol=1e-4)


@pytest.mark.peers
def test_text_tower_equals_open_clips_with_the_same_weights():
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.create_model("ViT-B-32-quickgelu").eval()
    ours = METHODS["clip"](PRESETS["vit_b32"]).eval()
    renamed = {}
    for name, p in theirs.state_dict().items():
        if name.startswith("transformer.resblocks."):
            name = name.replace("transformer.resblocks", "blocks").replace("ln_1", "norm1").replace("ln_2", "norm2")
            name = name.replace("in_proj_", "qkv.").replace("out_proj", "proj")
            renamed[name.replace("c_fc", "fc1").replace("c_proj", "fc2")] = p
    renamed |= {"pos_embed": theirs.positional_embedding, "norm.weight": theirs.ln_final.weight,
                "norm.bias": theirs.ln_final.bias, "token_embedding.weight": torch.cat(
                    [theirs.token_embedding.weight, torch.zeros(1, 512)])}  # and a row for [MASK]
    ours.text.load_state_dict(renamed, strict=True)
    ours.text_projection.weight.data = theirs.text_projection.T
    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(["a dog", "two teddy bears in the snow, seen from afar"])
    with torch.no_grad():
        assert torch.allclose(ours.encode_text(tokens[:, :20]), theirs.encode_text(tokens), atol=1e-4)
