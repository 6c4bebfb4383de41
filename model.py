"""MaskCLIP's networks and those of its baselines: towers, decoders, six methods, teacher, EMA.

Paper: section 3 and figure 2.  The image tower is timm's `vit_base_patch16_224`, names included;
the text tower is CLIP's.  Ideas: CLIP (towers), MAE (a mask as `ids_keep`), BERT (tied vocabulary
head), iBOT (codewords), DINO (a teacher outside the model).

    out = build(replace(PRESETS["vit_b16"], method="maskclip"))(batch)      # a dict of tensors
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Shapes   B  pairs of a batch       N  patches of an image, V visible and M hidden: N = V + M
#          L  tokens of a text       R  masked tokens of all B texts together
#          D  width of a tower       E  width of the joint embedding       K  codewords
#          H, W  height and width of an image, p  side of a patch: pixels
# Paper    E_I, E_T  image and text encoder; e_I, e_T (B, E) their outputs after projection
#          f  features of the visible patches, g those that the decoder D predicts for hidden ones
#          h  online tokenizer, patch feature -> codewords      -bar  the teacher's
# Masks    ids_keep (B, V), ids_hide (B, M)  patch numbers 0 .. N-1, row by row of the image: what
#             the student sees, and what is hidden from it
#          key_mask  bool, True = may be looked at


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
    vocab_size: int = 49409             # CLIP's 49,408 and [MASK]; the last are start, end, [MASK]
    text_width: int = 512               # paper
    text_depth: int = 12                # paper
    text_heads: int = 8                 # paper
    text_decoder_depth: int = 4         # paper
    codewords: int = 2048               # our choice: 2 % of CLIP's arithmetic (iBOT has 8,192)
    mae_decoder_depth: int = 8          # MAE, for method "mae" alone; the others: ONE block (paper)
    ssl_hidden: int = 4096              # SLIP's MLP head, 4096-4096-256
    ssl_dim: int = 256
    image_norm_eps: float = 1e-6        # timm; CLIP's own towers have 1e-5
    quick_gelu: tuple = (False, True)   # image, text: SLIP's towers; CLIP's own are (True, True)
    pre_norm: bool = False              # CLIP's own ViT: layer norm before the first block ...
    patch_bias: bool = True             # ... and no bias in the patch embedding
    interpolation: str = "bicubic"      # of test images: CLIP's, ELEVATER's; SLIP's is "bilinear"

    @property
    def grid(self):
        """Patches on a side; N is its square."""
        return self.image_size // self.patch_size


PRESETS = {
    # Our choice, for a laptop: 64 patches, and 1/60 of ViT-B's arithmetic for an image.
    "tiny": ModelConfig(image_size=64, patch_size=8, width=128, depth=3, heads=4, embed_dim=128,
                        context_length=40, vocab_size=2048, text_width=128, text_depth=3,
                        text_heads=4, text_decoder_depth=1, codewords=512, mae_decoder_depth=2,
                        ssl_hidden=512, ssl_dim=128),
    "vit_s16": ModelConfig(width=384),  # 12 heads, as SLIP's and MoCo v3's; timm has 6
    "vit_b32": ModelConfig(patch_size=32),
    "vit_b16": ModelConfig(),
    "vit_l16": ModelConfig(width=1024, depth=24, heads=16),
}


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def attention(q, k, v, key_mask=None, causal=False):
    """q (B, heads, Q, D/heads), k and v (B, heads, L, D/heads) -> (B, heads, Q, D/heads).

    key_mask (B, 1, 1, L), True = may be looked at; causal: query i looks at keys 0 .. i.
    """
    cpu_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if causal and (key_mask is not None or cpu_bf16):
        # PyTorch takes a mask or is_causal, never both, so both become one mask.
        lower = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
        key_mask = lower if key_mask is None else key_mask & lower              # (B, 1, Q, L)
        causal = False
    if not cpu_bf16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, is_causal=causal)
    # On CPUs with bfloat16 instructions PyTorch's kernel takes 2 to 8 times as long as this, half
    # of a step; on those without, whose bfloat16 is slower than float32, this takes twice as long.
    scores = q * q.size(-1) ** -0.5 @ k.mT                                      # (B, heads, Q, L)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, -math.inf)
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, key_mask=None, rows=slice(None)):
        """x (B, L, D), key_mask (B, L), True = may be looked at -> (B, L, D), or `rows` of L."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))        # (B, L, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, heads, L, D/heads)
        if key_mask is not None:
            key_mask = key_mask[:, None, None, :]                               # (B, 1, 1, L)
        x = attention(q[:, :, rows], k, v, key_mask, causal)        # causal: rows start at 0
        return self.proj(x.transpose(1, 2).flatten(2))                          # (B, L or rows, D)


class Block(nn.Module):
    """A pre-norm transformer block."""
    recompute = False  # activation checkpointing: keeps the input, computes the rest again backward
    drop_path = 0.0    # stochastic depth (fine-tuning): share of images that skip a branch

    def __init__(self, width, heads, eps=1e-5, quick_gelu=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width),
            act=QuickGELU() if quick_gelu else nn.GELU(),
            fc2=nn.Linear(4 * width, width)))

    def forward(self, x, causal=False, key_mask=None, rows=slice(None)):
        """x (B, L, D) -> (B, L, D), or only the `rows` of L that somebody reads."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, causal, key_mask, rows, use_reentrant=False)
        return self.compute(x, causal, key_mask, rows)

    def compute(self, x, causal, key_mask, rows):
        x = x[:, rows] + self.drop(self.attn(self.norm1(x), causal, key_mask, rows))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch):
        """(B, L, D), zero for some of B and scaled for the others: the mean stays (timm)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)


class ViT(nn.Module):
    """E_I, the image encoder: class token, learned positions, pre-norm blocks; timm's names."""

    def __init__(self, c):
        super().__init__()
        # One linear map for all patches, which do not overlap.  Name and layout are timm's.
        proj = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size, bias=c.patch_bias)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.grid ** 2, c.width))
        self.norm_pre = nn.LayerNorm(c.width, c.image_norm_eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(Block(c.width, c.heads, c.image_norm_eps, c.quick_gelu[0])
                                      for _ in range(c.depth)))
        self.norm = nn.LayerNorm(c.width, c.image_norm_eps)

    def embed(self, images, ids_keep=None):
        """Input of the first block: images (B, 3, H, W) -> (B, 1 + N or V, D)."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)                 # (B, N, D)
        x = x + self.pos_embed[:, 1:]   # before patches leave, so that each has its own
        if ids_keep is not None:        # hidden patches leave: a quarter of the cost at 75 % (MAE)
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.size(-1)))     # (B, V, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.size(0), -1, -1)    # (B, 1, D)
        return self.norm_pre(torch.cat([cls, x], 1))                            # (B, 1 + N or V, D)

    def forward(self, images, ids_keep=None, rows=slice(None)):
        """Normalised images (B, 3, H, W) -> (B, 1 + N, D), or with ids_keep f (B, 1 + V, D)."""
        x = self.blocks[:-1](self.embed(images, ids_keep))
        # The last block computes only the `rows` that are read; slice(1) is the class token.
        return self.norm(self.blocks[-1](x, rows=rows))

    def patch_views(self, images):
        """(B, 3, H, W) -> (B, depth, N, D): class tokens whose attention sees one patch only.

        View l, patch n: what the class token would be if it saw only patch n from block l on.  The
        last view is close to Zhou et al. 2022, "Extract Free Dense Labels from CLIP".  Class tokens
        and not patch tokens, because the projection to the joint space was trained on them.
        """
        x = self.embed(images)                                                  # (B, 1 + N, D)
        views = []
        for block in self.blocks:
            qkv = block.attn.qkv
            values = F.linear(block.norm1(x), qkv.weight.chunk(3)[2], qkv.bias.chunk(3)[2])
            seen = block.attn.proj(values)[:, 1:]       # by attention to one patch: (B, N, D)
            views.append(x[:, :1])                      # the view that starts here: (B, 1, D)
            views = [view + seen for view in views]                             # each (B, N, D)
            views = [view + block.mlp(block.norm2(view)) for view in views]
            x = block(x)
        return self.norm(torch.stack(views, 1))                                 # (B, depth, N, D)


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
        x = self.token_embedding(tokens) + self.pos_embed[:tokens.size(1)]      # (B, L, D)
        for block in self.blocks:
            # No key mask: causal tokens up to the end-of-text never look at the padding after it.
            x = block(x, causal=True)
        return self.norm(x)


class ImageDecoder(nn.Module):
    """D: features of visible patches, a mask token for each hidden one -> the hidden features."""

    def __init__(self, c, depth=1):  # ONE block (paper), so that E_I does the work
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1 + c.grid ** 2, c.width))
        self.blocks = nn.Sequential(*(Block(c.width, c.heads, c.image_norm_eps)
                                      for _ in range(depth)))
        self.norm = nn.LayerNorm(c.width, c.image_norm_eps)

    def forward(self, f, ids_keep, ids_hide):
        """f (B, 1 + V, D), ids_keep (B, V), ids_hide (B, M) -> g (B, M, D) in ids_hide's order."""
        B, M = ids_hide.shape
        # Tokens need not stand in the order of the image, because each carries its position.
        x = torch.cat([f, self.mask_token.expand(B, M, -1)], 1)                 # (B, 1 + N, D)
        cls = ids_keep.new_zeros(B, 1)
        positions = torch.cat([cls, 1 + ids_keep, 1 + ids_hide], 1)             # (B, 1 + N)
        # Not pos_embed[positions]: CPU threads would sum its gradient in a random order.
        x = self.blocks[:-1](x + F.embedding(positions, self.pos_embed))        # (B, 1 + N, D)
        return self.norm(self.blocks[-1](x, rows=slice(f.size(1), None)))       # (B, M, D)


class TextDecoder(nn.Module):
    """D_T: E_T's tokens of a masked caption -> features of the masked ones; FOUR blocks (paper)."""

    def __init__(self, c):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c.text_width, c.text_heads)
                                    for _ in range(c.text_decoder_depth))
        self.norm = nn.LayerNorm(c.text_width)

    def forward(self, x, key_mask, ids):
        """x (B, L, D), key_mask (B, L) True = not padding, ids (R,) of B * L tokens -> (R, D)."""
        for block in self.blocks:
            # It looks both ways (BERT): E_T is causal, so its tokens know nothing of what follows.
            x = block(x, key_mask=key_mask)
        return self.norm(x.flatten(0, 1)[ids])


class Codewords(nn.Linear):
    """h, the online tokenizer: the cosine of a patch feature and each of K codewords."""

    # Cosines, because iBOT's temperatures (0.1, 0.04) would make plain products all but one-hot.
    def forward(self, x):
        """(..., D) -> (..., K), from -1 to 1."""
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class RankMean(torch.autograd.Function):
    """The mean of a tensor over all ranks, and of its gradient: the map is its own transpose."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(x)
            x /= dist.get_world_size()
        return x

    backward = forward


class SyncBatchNorm(nn.Module):
    """Batch normalisation over the rows of ALL ranks, also on the CPU, which PyTorch's is not."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        """x (B, D) -> (B, D).  No running statistics: the head serves training only."""
        x = x.float()
        x = x - RankMean.apply(x.mean(0))
        variance = RankMean.apply((x ** 2).mean(0))                             # (D,)
        return x * (variance + 1e-5).rsqrt() * self.weight + self.bias          # 1e-5: PyTorch's


def ssl_head(c):
    """SimCLR's head in SLIP's form (4096-4096-256): class token (B, D) -> z (B, 256)."""
    def layer(width):  # no bias, because the norm would subtract it
        return nn.Linear(width, c.ssl_hidden, bias=False), SyncBatchNorm(c.ssl_hidden), nn.ReLU()

    return nn.Sequential(*layer(c.width), *layer(c.ssl_hidden), nn.Linear(c.ssl_hidden, c.ssl_dim))


# ---------------------------------------------------------------- the six methods
# A batch is a dict of tensors (data.Samples.collate; pixels normalised), and so is the result.
# `needs`: what a method reads of a batch.  `passes`: forward passes that share weights, but no
# activations, so that training can take one after the other:
#   masked       a part of the image, or of the caption, is hidden from the student
#   views        two more augmented views of an image, for SimCLR
#   contrastive  the full image and the full text

class VisionModel(nn.Module):
    """An image tower, and the passes that need no text: a subclass lists those that it takes."""
    needs = ()
    passes = ()

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = ViT(config)

    def forward(self, batch, passes=None, project=True):
        """What the losses of some passes read (default: of all), by name.

        masked: pixels (B, N, p*p*3), or student_logits (B, M, K) and mlm_logits (R, vocabulary).
        views: z1, z2 (B, 256).  contrastive: image (B, E), text (B, E), scale ().
        project=False: features of each pair, for `project` on those of all parts (GradCache)
        """
        out = {}
        for name in passes or self.passes:
            if name == "masked":
                out |= self.masked(batch)
            else:
                features = self.views(batch) if name == "views" else self.contrastive(batch)
                out |= self.project(features) if project else features
        return out

    def project(self, features):
        """view1, view2 -> z1, z2; or image, text -> the same and scale.  Of ALL pairs of a rank."""
        if "view1" not in features:
            return features | dict(scale=self.logit_scale.exp())
        # The head normalises over the batch; each view has its own statistics, as in SLIP.
        return dict(z1=self.ssl_head(features["view1"]), z2=self.ssl_head(features["view2"]))

    def views(self, batch):
        """-> view1, view2 (B, D): class tokens of views (B, 2, 3, H, W)."""
        view1 = self.visual(batch["views"][:, 0], rows=slice(1))[:, 0]          # (B, D)
        view2 = self.visual(batch["views"][:, 1], rows=slice(1))[:, 0]          # (B, D)
        return dict(view1=view1, view2=view2)

    def masked(self, batch):
        """-> pixels (B, N, p*p*3): MAE's prediction of the hidden patches, zero at visible ones."""
        ids_keep, ids_hide = batch["ids_keep"], batch["ids_hide"]
        f = self.visual(batch["images"], ids_keep)                              # (B, 1 + V, D)
        g = self.image_decoder(f, ids_keep, ids_hide)                           # (B, M, D)
        hidden = self.pixel_head(g)                                             # (B, M, p*p*3)
        pixels = hidden.new_zeros(len(hidden), self.config.grid ** 2, hidden.size(-1))
        return dict(pixels=pixels.scatter(1, ids_hide[..., None].expand_as(hidden), hidden))


class SimCLR(VisionModel):
    """SimCLR alone, with SLIP's head and views."""
    needs = ("views",)
    passes = ("views",)

    def __init__(self, config):
        super().__init__(config)
        self.ssl_head = ssl_head(config)


class MAE(VisionModel):
    """MAE alone (He et al. 2022)."""
    needs = ("images", "mask")
    passes = ("masked",)

    def __init__(self, config):
        super().__init__(config)
        self.image_decoder = ImageDecoder(config, config.mae_decoder_depth)
        self.pixel_head = nn.Linear(config.width, 3 * config.patch_size ** 2)


class CLIP(VisionModel):
    """Contrastive language-image pretraining: L_I + L_T."""
    needs = ("images", "text")
    passes = ("contrastive",)

    def __init__(self, config):
        super().__init__(config)
        self.text = TextTransformer(config)
        self.image_projection = nn.Linear(config.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))       # CLIP
        self.eot = config.vocab_size - 2  # the tokenizer's last ids are start, end, [MASK]

    def encode_image(self, images):
        """(B, 3, H, W) -> (B, E), before length normalisation."""
        return self.image_projection(self.visual(images, rows=slice(1))[:, 0])

    def encode_text(self, tokens):
        """(B, L) -> (B, E), before length normalisation."""
        x = self.text(tokens)                                                   # (B, L, D)
        # The first end-of-text is the one token that looks at the whole text.  CLIP takes the
        # largest id, but here [MASK] is larger.
        end = (tokens == self.eot).int().argmax(1)                              # (B,)
        x = x[torch.arange(len(x), device=x.device), end]                       # (B, D)
        return self.text_projection(x)

    def encode_patches(self, images):
        """(B, 3, H, W) -> (B, N, E): patch features in the joint space, before normalisation."""
        # The mean of the unit features of all views scored best of what we tried (docs/choices.md).
        views = self.image_projection(self.visual.patch_views(images))          # (B, depth, N, E)
        return F.normalize(views, dim=-1).mean(1)

    def contrastive(self, batch):
        """-> image (B, E), text (B, E)."""
        return dict(image=self.encode_image(batch["images"]),
                    text=self.encode_text(batch["tokens"]))


class SLIP(CLIP):
    """CLIP and SimCLR on two more views (Mu et al. 2022)."""
    needs = (*CLIP.needs, "views")
    passes = ("views", "contrastive")

    def __init__(self, config):
        super().__init__(config)
        self.ssl_head = ssl_head(config)


class CLIPMAE(CLIP):
    """CLIP and MAE's pixels, by a decoder like MaskCLIP's (paper: the baseline CLIP + MAE)."""
    needs = (*CLIP.needs, "mask")
    passes = ("masked", "contrastive")

    def __init__(self, config):
        super().__init__(config)
        self.image_decoder = ImageDecoder(config)
        self.pixel_head = nn.Linear(config.width, 3 * config.patch_size ** 2)


class MaskCLIP(CLIP):
    """The paper's figure 2, from the inputs on the left to the losses on the right:

        contrastive   full image      -> E_I -> class token          -> e_I  \\
                      full text       -> E_T -> end-of-text          -> e_T  /  L_I + L_T
        masked        visible patches -> E_I -> f     -> D -> g -> h ->      \\
        Teacher       full image      -> E_I-bar -> f-bar -> h-bar   ->      /  lambda L_Dist
        masked        masked text     -> E_T -> D_T -> vocabulary    ->         beta L_MLM
    """
    needs = (*CLIP.needs, "mask", "mlm")
    passes = ("masked", "contrastive")

    def __init__(self, config):
        super().__init__(config)
        self.image_decoder = ImageDecoder(config)
        self.codewords = Codewords(config.width, config.codewords, bias=False)      # h
        self.text_decoder = TextDecoder(config)
        self.vocabulary_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def masked(self, batch):
        """-> student_logits (B, M, K) in ids_hide's order, mlm_logits (R, vocabulary)."""
        ids_keep, ids_hide = batch["ids_keep"], batch["ids_hide"]
        f = self.visual(batch["images"], ids_keep)                              # (B, 1 + V, D)
        g = self.image_decoder(f, ids_keep, ids_hide)                           # (B, M, D)
        # Row (b, m) is patch ids_hide[b, m]; Teacher.forward picks its rows by the same ids_hide.
        student_logits = self.codewords(g)                                      # (B, M, K)

        is_end = batch["mlm_tokens"] == self.eot                                # (B, L)
        ends_before = is_end.cumsum(1) - is_end.int()
        key_mask = ends_before == 0         # (B, L), True up to the first end-of-text: no padding
        x = self.text(batch["mlm_tokens"])                                      # (B, L, D)
        x = self.text_decoder(x, key_mask, batch["mlm_ids"])                    # (R, D)
        # BERT: the vocabulary's weights are those of the token embedding.
        mlm_logits = F.linear(x, self.text.token_embedding.weight, self.vocabulary_bias)
        return dict(student_logits=student_logits, mlm_logits=mlm_logits)       # (R, vocabulary)


class Teacher(nn.Module):
    """E_I-bar and h-bar: a frozen copy of the student's image tower and codewords.

    It has no gradient and stands outside the model, so neither DDP nor the optimiser sees it.  Only
    ema_update moves it, and losses.update_center its center (K,), the running mean of its logits.
    """

    def __init__(self, student):
        super().__init__()
        self.visual = copy.deepcopy(student.visual)
        self.codewords = copy.deepcopy(student.codewords)
        self.register_buffer("center", torch.zeros(student.config.codewords))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, ids_hide):
        """The FULL images (B, 3, H, W), ids_hide (B, M) -> logits (B, M, K) in ids_hide's order."""
        f = self.visual(images)[:, 1:]                                          # (B, N, D)
        # Only hidden patches go to the codewords, because these cost more than a block.
        f = f.gather(1, ids_hide[..., None].expand(-1, -1, f.size(-1)))         # (B, M, D)
        return self.codewords(f)


@torch.no_grad()
def ema_update(teacher, student, momentum, finite=None):
    """theta_teacher = momentum * theta_teacher + (1 - momentum) * theta_student

    finite () bool tensor: False if the step was skipped, which leaves the teacher as it is.
    """
    new = [student.get_parameter(name) for name, _ in teacher.named_parameters()]
    share = 1 - momentum
    if finite is not None:  # a tensor, because reading `finite` would make the CPU wait for the GPU
        share = [torch.where(finite, share, 0.0)] * len(new)
    # One call for all parameters: one by one takes several times as long (docs/speed.md).
    torch._foreach_lerp_(list(teacher.parameters()), new, share)


def set_up_blocks(network, recompute, compile):
    """Activation checkpointing, and torch.compile, for all transformer blocks of a network."""
    for module in network.modules():
        if isinstance(module, Block):
            module.recompute = recompute
            if compile:
                # All blocks share one code, so the variants (tower, mask, length) count together.
                torch._dynamo.config.recompile_limit = 256
                module.compile(dynamic=False)


METHODS = dict(clip=CLIP, slip=SLIP, clip_mae=CLIPMAE, maskclip=MaskCLIP, simclr=SimCLR, mae=MAE)


def build(config):
    """A model with fresh weights.  ValueError for an unknown method."""
    if config.method not in METHODS:
        raise ValueError(f"unknown method '{config.method}': one of {', '.join(METHODS)}")
    # Constructors draw numbers that init_weights replaces.  They must not move the seed's sequence,
    # so that CLIP's part starts equal in all methods that hold it.
    with torch.random.fork_rng(devices=[]):
        model = METHODS[config.method](config)
    init_weights(model)
    return model


def init_weights(model):
    """All initial weights, in one place.

    Xavier uniform as in MAE's ViT, because it suits narrow models too; CLIP's scheme in the text
    tower.  What is not drawn: biases are 0, norms 1, sigma 0.07 (CLIP).
    """
    width, depth = model.config.text_width, model.config.text_depth
    text_std = {"qkv": width ** -0.5, "fc1": (2 * width) ** -0.5}               # CLIP
    # The other layers add to the residual stream: the more of them, the less each (CLIP).
    residual_std = (2 * width * depth) ** -0.5

    for name, p in model.named_parameters():
        path, _, kind = name.rpartition(".")
        layer = path.rpartition(".")[2]
        if name == "text.pos_embed":
            nn.init.normal_(p, std=0.01)                                        # CLIP
        elif kind in ("cls_token", "mask_token", "pos_embed") or layer == "token_embedding":
            nn.init.normal_(p, std=0.02)                                        # MAE, timm, CLIP
        elif layer in ("image_projection", "text_projection"):
            nn.init.normal_(p, std=p.size(1) ** -0.5)                           # CLIP
        elif kind == "bias":
            nn.init.zeros_(p)
        elif p.ndim > 1 and name.startswith("text.blocks"):
            nn.init.normal_(p, std=text_std.get(layer, residual_std))           # CLIP
        elif layer == "qkv":
            for part in p.chunk(3):     # three matrices in one
                nn.init.xavier_uniform_(part)
        elif path.endswith("patch_embed.proj"):
            nn.init.xavier_uniform_(p.view(len(p), -1))     # the pixels of a patch are one row
        elif p.ndim > 1:
            nn.init.xavier_uniform_(p)
