"""MaskCLIP's networks and those of its baselines: ViT, text transformer, decoders, six methods, EMA teacher.

Paper: section 3 and figure 2.  Layouts: the image tower is timm's `vit_base_patch16_224`, names included; the text
tower is CLIP's.  Ideas: CLIP (towers), MAE (a mask as `ids_keep`), BERT (tied vocabulary head), DINO (teacher outside
the model), Zhou et al. 2022 (patch features from a frozen CLIP).

Shapes: B batch, N patches, M hidden and V = N - M visible patches, L text tokens, R masked text tokens of the batch,
D width, E joint embedding, K codewords.  `ids_keep` (B, V) and `ids_hide` (B, M) are patch numbers in 0 .. N-1:
what the student sees, and what is hidden from it.

    model = build(replace(PRESETS["vit_b16"], method="maskclip"));  out = model(batch)
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of a model; saved in each checkpoint."""
    method: str = "maskclip"            # a key of METHODS
    image_size: int = 224
    patch_size: int = 16
    width: int = 768                    # ViT-B (paper)
    depth: int = 12
    heads: int = 12
    embed_dim: int = 512                # SLIP recipe
    context_length: int = 77            # CLIP
    vocab_size: int = 49409             # CLIP's 49,408 and [MASK]; the last three ids are start, end, [MASK]
    text_width: int = 512               # paper
    text_depth: int = 12                # paper
    text_heads: int = 8                 # paper
    text_decoder_depth: int = 4         # paper
    codewords: int = 8192               # iBOT; the paper does not say
    distill: str = "hidden"             # patches whose codewords are predicted: the paper's, or "all"
    mae_decoder_depth: int = 8          # MAE, for method "mae" alone; the others decode with ONE block (paper)
    ssl_hidden: int = 4096              # SLIP's MLP head, 4096-4096-256
    ssl_dim: int = 256
    image_norm_eps: float = 1e-6        # timm; CLIP's own towers have 1e-5
    quick_gelu: tuple = (False, True)   # image, text: SLIP's towers; CLIP's own are (True, True)
    pre_norm: bool = False              # CLIP's own ViT: layer norm before the first block ...
    patch_bias: bool = True             # ... and no bias in the patch embedding
    interpolation: str = "bicubic"      # of test pictures: CLIP's, ELEVATER's; SLIP's is "bilinear"

    @property
    def grid(self):
        """Patches a side; N is its square."""
        return self.image_size // self.patch_size


PRESETS = {
    # Our choice, for a laptop: 64 patches, and 1/60 of ViT-B's arithmetic a picture.
    "tiny": ModelConfig(image_size=64, patch_size=8, width=128, depth=3, heads=4, embed_dim=128, context_length=40,
                        vocab_size=2048, text_width=128, text_depth=3, text_heads=4, text_decoder_depth=1,
                        codewords=512, mae_decoder_depth=2, ssl_hidden=512, ssl_dim=128),
    "vit_s16": ModelConfig(width=384),  # 12 heads, as SLIP's and MoCo v3's; timm has 6
    "vit_b32": ModelConfig(patch_size=32),
    "vit_b16": ModelConfig(),
    "vit_l16": ModelConfig(width=1024, depth=24, heads=16),
}


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def attention(q, k, v, mask=None, causal=False):
    """q (B, heads, R, D), k and v (B, heads, L, D), mask of the keys, bool, (B, 1, 1, L) -> (B, heads, R, D)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # On the CPU PyTorch's kernel takes several times as long as this in bfloat16 (bench.py parts).
    scores = q * q.size(-1) ** -0.5 @ k.mT                                          # (B, heads, R, L)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, key_mask=None, rows=slice(None)):
        """x (B, L, D) -> (B, L, D), or of `rows` of L alone.  key_mask (B, L) bool, True = may be looked at.

        Where causal, rows must begin with the first.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # each (B, heads, L, D/heads)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        x = attention(q[:, :, rows], k, v, mask, causal)
        return self.proj(x.transpose(1, 2).flatten(2))

    def values(self, x):
        """What each position would give if it looked at itself alone: x (B, L, D) -> (B, L, D)."""
        width = x.size(-1)
        return self.proj(F.linear(x, self.qkv.weight[-width:], self.qkv.bias[-width:]))


class Block(nn.Module):
    """A pre-norm transformer block."""
    recompute = False  # activation checkpointing: keep the input alone, compute the rest again in the backward pass
    drop_path = 0.0    # stochastic depth (fine-tuning): share of pictures that pass by a branch, in training mode

    def __init__(self, width, heads, eps=1e-5, quick_gelu=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))

    def forward(self, x, causal=False, key_mask=None, rows=slice(None)):
        """x (B, L, D) -> (B, L, D), or the `rows` of it that are read: a last block need not compute the others."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.inner, x, causal, key_mask, rows, use_reentrant=False,
                              preserve_rng_state=self.drop_path > 0)
        return self.inner(x, causal, key_mask, rows)

    def inner(self, x, causal, key_mask, rows):
        """What forward does."""
        x = x[:, rows] + self.dropped(self.attn(self.norm1(x), causal, key_mask, rows))
        return x + self.dropped(self.mlp(self.norm2(x)))

    def dropped(self, branch):
        """(B, L, D), all zero for some of B, the others larger by as much: the mean stays (timm's DropPath)."""
        if not (self.drop_path and self.training):
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map (timm's name and layout: a convolution)."""

    def __init__(self, patch_size, width, bias=True):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=bias)

    def forward(self, images):
        """(B, 3, H, W) -> (B, N, D)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """E_I, the image encoder: class token, learned positions, pre-norm blocks; timm's layout and names."""

    def __init__(self, c):
        super().__init__()
        self.patch_embed = PatchEmbed(c.patch_size, c.width, c.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.grid ** 2, c.width))
        self.norm_pre = nn.LayerNorm(c.width, c.image_norm_eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(Block(c.width, c.heads, c.image_norm_eps, c.quick_gelu[0])
                                      for _ in range(c.depth)))
        self.norm = nn.LayerNorm(c.width, c.image_norm_eps)

    def embed(self, images, ids_keep=None):
        """What the first block reads: images (B, 3, H, W) -> (B, 1 + N or V, D)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]                        # (B, N, D)
        if ids_keep is not None:
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.size(-1)))         # (B, V, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.size(0), -1, -1)    # (B, 1, D)
        return self.norm_pre(torch.cat([cls, x], 1))                                # (B, 1 + N or V, D)

    def forward(self, images, ids_keep=None, rows=slice(None)):
        """images (B, 3, H, W) normalised; ids_keep (B, V): only these patches are seen.  -> (B, 1 + N or V, D)

        rows: the places of the result that are wanted, all unless said: slice(1) is the class token.
        """
        x = self.blocks[:-1](self.embed(images, ids_keep))
        return self.norm(self.blocks[-1](x, rows=rows))

    def patch_views(self, images):
        """(B, 3, H, W) -> (B, depth, N, D): the class token as if it looked at one patch alone, from block l on.

        Before block l it is that of block l for all patches; from there its attention falls on each patch by itself, so
        it adds that patch's value.  What leaves is a class token, so it lies where the projection was trained; the last
        layer's patch tokens do not.  l = last is close to Zhou et al. 2022 ("Extract Free Dense Labels from CLIP"),
        who add the values to each patch's own residual instead.
        """
        x, views = self.embed(images), []                                           # (B, 1 + N, D), [] of (B, N, D)
        for block in self.blocks:
            values = block.attn.values(block.norm1(x))[:, 1:]                       # (B, N, D)
            views = [view + values for view in (*views, x[:, :1])]
            views = [view + block.mlp(block.norm2(view)) for view in views]
            x = block(x)
        return self.norm(torch.stack(views, 1))


class TextTransformer(nn.Module):
    """E_T before its projection: CLIP's causal transformer."""

    def __init__(self, c):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.pos_embed = nn.Parameter(torch.zeros(c.context_length, c.text_width))
        self.blocks = nn.ModuleList(Block(c.text_width, c.text_heads, quick_gelu=c.quick_gelu[1])
                                    for _ in range(c.text_depth))
        self.norm = nn.LayerNorm(c.text_width)

    def forward(self, tokens):
        """tokens (B, L), L up to the context length -> (B, L, D)."""
        x = self.token_embedding(tokens) + self.pos_embed[:tokens.size(1)]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x)


class ImageDecoder(nn.Module):
    """D: visible features and a mask token per hidden patch -> features of the hidden patches (paper: ONE block)."""

    def __init__(self, c, depth=1):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1 + c.grid ** 2, c.width))
        self.blocks = nn.Sequential(*(Block(c.width, c.heads, c.image_norm_eps) for _ in range(depth)))
        self.norm = nn.LayerNorm(c.width, c.image_norm_eps)

    def forward(self, f, ids_keep, ids_hide, visible=False):
        """f (B, 1 + V, D) -> g (B, M, D), in the order of ids_hide; with `visible` (B, N, D), those of ids_keep first.

        Order is free, for each token has its position.
        """
        B, M = ids_hide.shape
        x = torch.cat([f, self.mask_token.expand(B, M, -1)], 1)                           # (B, 1 + N, D)
        places = torch.cat([ids_keep.new_zeros(B, 1), 1 + ids_keep, 1 + ids_hide], 1)     # (B, 1 + N)
        # F.embedding, for the gradient of plain indexing is summed in a random order on several CPU threads.
        x = self.blocks[:-1](x + F.embedding(places, self.pos_embed))
        return self.norm(self.blocks[-1](x, rows=slice(1 if visible else f.size(1), None)))   # (B, M or N, D)


class TextDecoder(nn.Module):
    """D_T: E_T's tokens of a masked caption -> features at the masked places; looks both ways (paper: FOUR blocks)."""

    def __init__(self, c):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c.text_width, c.text_heads) for _ in range(c.text_decoder_depth))
        self.norm = nn.LayerNorm(c.text_width)

    def forward(self, x, key_mask, ids):
        """x (B, L, D), key_mask (B, L) True = not padding, ids (R,) places in the flattened (B, L) -> (R, D)."""
        for block in self.blocks:
            x = block(x, key_mask=key_mask)
        return self.norm(x.flatten(0, 1)[ids])


class _RankMean(torch.autograd.Function):
    """The mean of a tensor over all ranks; each rank's gradient is then the mean of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    backward = forward  # the map is its own transpose


class Codewords(nn.Linear):
    """h, the online tokenizer: the cosine of a patch feature and each of K codewords.

    iBOT's temperatures (0.1, 0.04) are made for cosines: its head normalises features and last layer too.  With plain
    products the teacher is all but one-hot from the first step, and the contrastive loss falls more slowly.
    """

    def __init__(self, width, codewords):
        super().__init__(width, codewords, bias=False)

    def forward(self, x):
        """(..., D) -> (..., K) in -1 .. 1."""
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class SyncBatchNorm(nn.Module):
    """Batch normalisation over the rows of ALL ranks, on CPU too (PyTorch's is for CUDA only)."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        """x (B, D) -> (B, D).  The head is for training only, so there are no running statistics."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        mean = (lambda rows: _RankMean.apply(rows.mean(0))) if several else (lambda rows: rows.mean(0))
        x = x.float()
        x = x - mean(x)
        return x * (mean(x ** 2) + self.eps).rsqrt() * self.weight + self.bias


def ssl_head(c):
    """SimCLR's projection head in SLIP's form (4096-4096-256): class token (B, D) -> z (B, 256)."""
    def layer(width):  # no bias: the norm would take it away
        return nn.Linear(width, c.ssl_hidden, bias=False), SyncBatchNorm(c.ssl_hidden), nn.ReLU()
    return nn.Sequential(*layer(c.width), *layer(c.ssl_hidden), nn.Linear(c.ssl_hidden, c.ssl_dim))


# ---------------------------------------------------------------- the six methods
# A batch is a dict of tensors (data.Samples.collate, pixels normalised; `needs` names what it reads), and so is what
# forward returns; losses are train.py's business.  forward is made of passes that share nothing but weights, so that
# training can take each, with its losses, forward and back before the next one needs the memory.  `pairs` and `views`
# treat each pair by itself, `across` all of them together: what does not fit is taken in pieces (train.Step).

class VisionModel(nn.Module):
    """What all methods share: an image tower, and a forward pass made of `passes`, which name methods."""
    passes = ()

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = ViT(config)

    def across(self, features):
        """What `pairs` or `views` gave for ALL pairs of this rank -> what the losses that compare pairs read."""
        return features

    def forward(self, batch, passes=None):
        """What the losses of some passes read; unless said, of all."""
        out = {}
        for name in passes or self.passes:
            features = getattr(self, name)(batch)
            out |= features if name == "masked" else self.across(features)
        return out


class CLIP(VisionModel):
    """Contrastive language-image pretraining: L_I + L_T."""
    needs = ("images", "text")
    passes = ("pairs",)

    def __init__(self, config):
        super().__init__(config)
        self.text = TextTransformer(config)
        self.image_projection = nn.Linear(config.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP
        self.eot = config.vocab_size - 2  # the tokenizer's last ids are start, end, [MASK]

    def encode_image(self, images):
        """(B, 3, H, W) -> (B, E), before length normalisation."""
        return self.image_projection(self.visual(images, rows=slice(1))[:, 0])

    def encode_text(self, tokens):
        """(B, L) -> (B, E), before length normalisation: the token at the first end-of-text."""
        x = self.text(tokens)                                                          # (B, L, D)
        x = x[torch.arange(len(x), device=x.device), (tokens == self.eot).int().argmax(1)]    # (B, D)
        return self.text_projection(x)

    def encode_patches(self, images):
        """(B, 3, H, W) -> (B, N, E): patch features in the joint space, before length normalisation.

        The mean of the unit features of ViT.patch_views: it scored best of what we tried (README).
        """
        return F.normalize(self.image_projection(self.visual.patch_views(images)), dim=-1).mean(1)

    def pairs(self, batch):
        """-> image (B, E), text (B, E)."""
        return dict(image=self.encode_image(batch["images"]), text=self.encode_text(batch["tokens"]))

    def across(self, features):
        """-> image, text, and scale ()."""
        return features | dict(scale=self.logit_scale.exp())


class SLIP(CLIP):
    """CLIP and SimCLR on two further views (Mu et al. 2022)."""
    needs = (*CLIP.needs, "views")
    passes = ("views", "pairs")

    def __init__(self, config):
        super().__init__(config)
        self.ssl_head = ssl_head(config)

    def views(self, batch):
        """-> view1, view2 (B, D)."""
        return two_views(self, batch)

    def across(self, features):
        """-> z1, z2 (B, 256) of views, else CLIP's."""
        return compared_views(self, features) if "view1" in features else super().across(features)


class SimCLR(VisionModel):
    """SimCLR alone, with SLIP's head and views."""
    needs = ("views",)
    passes = ("views",)

    def __init__(self, config):
        super().__init__(config)
        self.ssl_head = ssl_head(config)

    def views(self, batch):
        """-> view1, view2 (B, D)."""
        return two_views(self, batch)

    def across(self, features):
        """-> z1, z2 (B, 256)."""
        return compared_views(self, features)


def two_views(model, batch):
    """views (B, 2, 3, H, W) -> view1, view2 (B, D), their class tokens"""
    return {f"view{i + 1}": model.visual(batch["views"][:, i], rows=slice(1))[:, 0] for i in range(2)}


def compared_views(model, features):
    """view1, view2 (B, D) -> z1, z2 (B, 256).  Each view has batch statistics of its own, as in SLIP."""
    return dict(z1=model.ssl_head(features["view1"]), z2=model.ssl_head(features["view2"]))


class CLIPMAE(CLIP):
    """CLIP and reconstruction of hidden patches' pixels from the visible ones, by the same decoder as MaskCLIP's."""
    needs = (*CLIP.needs, "mask")
    passes = ("masked", "pairs")

    def __init__(self, config):
        super().__init__(config)
        self.image_decoder = ImageDecoder(config)
        self.pixel_head = nn.Linear(config.width, 3 * config.patch_size ** 2)

    def masked(self, batch):
        """-> pixels (B, N, p*p*3), zero at the visible patches."""
        return hidden_pixels(self, batch)


class MAE(VisionModel):
    """MAE alone (He et al. 2022)."""
    needs = ("images", "mask")
    passes = ("masked",)

    def __init__(self, config):
        super().__init__(config)
        self.image_decoder = ImageDecoder(config, config.mae_decoder_depth)
        self.pixel_head = nn.Linear(config.width, 3 * config.patch_size ** 2)

    def masked(self, batch):
        """-> pixels (B, N, p*p*3), zero at the visible patches."""
        return hidden_pixels(self, batch)


def hidden_pixels(model, batch):
    """-> pixels (B, N, p*p*3): predicted at the hidden patches, zero at the visible ones."""
    f = model.visual(batch["images"], batch["ids_keep"])                               # (B, 1 + V, D)
    g = model.image_decoder(f, batch["ids_keep"], batch["ids_hide"])                   # (B, M, D)
    rows = model.pixel_head(g)                                                         # (B, M, p*p*3)
    pixels = rows.new_zeros(len(rows), model.config.grid ** 2, rows.size(-1))          # (B, N, p*p*3)
    return dict(pixels=pixels.scatter(1, batch["ids_hide"][..., None].expand_as(rows), rows))


class MaskCLIP(CLIP):
    """CLIP, masked self-distillation of the image and masked language modelling of the caption (paper).

    CLIP's part sees the full image and the full text.
    """
    needs = (*CLIP.needs, "mask", "mlm")
    passes = ("masked", "pairs")

    def __init__(self, config):
        super().__init__(config)
        self.image_decoder = ImageDecoder(config)
        self.codewords = Codewords(config.width, config.codewords)   # h; the teacher holds h-bar
        self.text_decoder = TextDecoder(config)
        self.vocabulary_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def distilled(self, batch):
        """The patches whose codewords are predicted: (B, M) the hidden ones, or (B, N) the visible ones and them."""
        keep, hide = batch["ids_keep"], batch["ids_hide"]
        return torch.cat([keep, hide], 1) if self.config.distill == "all" else hide

    def masked(self, batch):
        """-> student_logits (B, M or N, K) of the patches `distilled`, mlm_logits (R, V) of the masked tokens."""
        f = self.visual(batch["images"], batch["ids_keep"])                            # (B, 1 + V, D)
        g = self.image_decoder(f, batch["ids_keep"], batch["ids_hide"], self.config.distill == "all")
        student_logits = self.codewords(g)                                             # (B, M or N, K)

        masked = batch["mlm_tokens"]                                                   # (B, L)
        key_mask = (masked == self.eot).cumsum(1) - (masked == self.eot).int() == 0    # (B, L) up to the first end
        x = self.text_decoder(self.text(masked), key_mask, batch["mlm_ids"])           # (R, D)
        mlm_logits = F.linear(x, self.text.token_embedding.weight, self.vocabulary_bias)          # (R, V)
        return dict(student_logits=student_logits, mlm_logits=mlm_logits)


class Teacher(nn.Module):
    """E_I-bar and h-bar: a frozen copy of the student's image tower and codeword head, moved by `ema_update`.

    `center` (K,) is the running mean of its logits (losses.update_center).
    """

    def __init__(self, student):
        super().__init__()
        self.visual = copy.deepcopy(student.visual)
        self.codewords = copy.deepcopy(student.codewords)
        self.register_buffer("center", torch.zeros(student.config.codewords))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, ids):
        """The FULL image -> logits (B, M, K) of some patches (B, M): those that are hidden from the student."""
        x = self.visual(images)[:, 1:]                                                 # (B, N, D)
        return self.codewords(x.gather(1, ids[..., None].expand(-1, -1, x.size(-1))))


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """theta_teacher = momentum * theta_teacher + (1 - momentum) * theta_student, for each parameter of the teacher.

    The student may hold more than the teacher.  Raises KeyError for a parameter of the teacher that it lacks.
    """
    of_student = dict(student.named_parameters())
    names, parameters = zip(*teacher.named_parameters())
    torch._foreach_lerp_(list(parameters), [of_student[name] for name in names], 1 - momentum)


METHODS = dict(clip=CLIP, slip=SLIP, clip_mae=CLIPMAE, maskclip=MaskCLIP, simclr=SimCLR, mae=MAE)


def build(config):
    """A model with fresh weights.  Raises ValueError for an unknown method or a patch size that does not fit."""
    if config.method not in METHODS:
        raise ValueError(f"unknown method '{config.method}': one of {', '.join(METHODS)}")
    if config.image_size % config.patch_size:
        raise ValueError(f"image size {config.image_size} is not a multiple of patch size {config.patch_size}")
    with torch.random.fork_rng(devices=[]):  # what constructors draw is drawn anew below: not drawn from the seed,
        model = METHODS[config.method](config)  # it leaves CLIP's part equal in all methods that hold it
    init_weights(model)
    return model


def init_weights(model):
    """All initial weights, in one place.

    Linear layers: Xavier uniform as MAE's ViT, so that narrow models start at a sensible scale too; CLIP's scheme in
    the text tower.  Biases zero, layer norms one.  Positions, class and mask tokens: normal, std .02 (MAE, timm).
    """
    for name, p in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("cls_token", "mask_token", "pos_embed"):
            nn.init.normal_(p, std=0.01 if name == "text.pos_embed" else 0.02)       # CLIP: .01
        elif "token_embedding" in name:
            nn.init.normal_(p, std=0.02)                                              # CLIP
        elif "projection" in name:
            nn.init.normal_(p, std=p.size(1) ** -0.5)                                 # CLIP: width ** -.5
        elif "patch_embed" in name and p.ndim > 1:
            nn.init.xavier_uniform_(p.view(len(p), -1))                               # MAE
        elif p.ndim > 1:
            width, layers = model.config.text_width, model.config.text_depth
            if name.startswith("text.blocks"):                                        # CLIP, by the part of the block
                nn.init.normal_(p, std={"qkv": width ** -0.5, "fc1": (2 * width) ** -0.5}.get(
                    name.split(".")[-2], (2 * width * layers) ** -0.5))
            elif "qkv" in name:
                for part in p.chunk(3):                                               # three matrices in one
                    nn.init.xavier_uniform_(part)
            else:
                nn.init.xavier_uniform_(p)
        elif leaf == "bias":
            nn.init.zeros_(p)
