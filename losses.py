"""Every equation of the paper's method and of its baselines, one function each.

Each loss takes this rank's rows and is a mean such that, after DDP has averaged the gradients over the ranks, they
equal those of one process that holds the global batch.  All is computed in float32.  Symbols: B pairs of a rank,
W ranks, K codewords, R rows; e_I, e_T unit feature vectors; sigma the learned temperature, scale = 1 / sigma.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def _world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """(B, E) of each rank -> (W * B, E), in rank order.  A row's gradient is the sum over all ranks."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(_world())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(_world())[dist.get_rank()]


def gather(x):
    """(B, E) on each rank, the same B everywhere -> (W * B, E) on each rank, with gradient."""
    return _Gather.apply(x) if _world() > 1 else x


def _own_rows(x):
    """The row numbers that this rank's B rows have in the gathered batch."""
    rank = dist.get_rank() if _world() > 1 else 0
    return torch.arange(len(x), device=x.device) + rank * len(x)


def all_sum(x):
    """The sum of a small tensor over all ranks, without gradient."""
    x = x.detach().clone()
    if _world() > 1:
        dist.all_reduce(x)
    return x


def _global_mean(values, weight, total=None):
    """The weighted mean over all ranks' values, up to a factor W that DDP's averaging takes away again.

    values, weight of one shape.  total (): the sum of all weights, where these values are a part of a rank's; what the
    parts give then adds up to that mean.  Where nothing has any weight the mean is 0.
    """
    total = all_sum(weight.sum()) if total is None else total
    return (values * weight).sum() * _world() / total.clamp(min=1e-9)


def contrastive_loss(image_features, text_features, scale):
    """L_I = -1/B sum_i log softmax_j(e_I(i) . e_T(j) / sigma)[i],  L_T the same with the two swapped  (paper, eq. 1-2)

    image_features, text_features (B, E) of any length; scale () = 1 / sigma -> (L_I, L_T)
    """
    e_i, e_t = F.normalize(image_features.float(), dim=1), F.normalize(text_features.float(), dim=1)
    target = _own_rows(e_i)
    return (F.cross_entropy(scale * e_i @ gather(e_t).T, target),   # (B, W * B): never (W * B, W * B)
            F.cross_entropy(scale * e_t @ gather(e_i).T, target))


@torch.no_grad()
def contrastive_accuracy(image, text):
    """Share of this rank's pictures to which, of all ranks' texts, their own is nearest.  (B, E), (B, E) -> ()"""
    e_i, e_t = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
    return ((e_i @ gather(e_t).T).argmax(1) == _own_rows(e_i)).float().mean()


def simclr_loss(z1, z2, temperature=0.1):
    """L = mean over the 2B views of -log softmax over all OTHER views of (z . z' / t), at its partner  (SimCLR, SLIP)

    z1, z2 (B, D) of any length -> ()
    """
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    all1, all2 = gather(z1), gather(z2)
    own = _own_rows(z1)
    itself = own[:, None] == torch.arange(len(all1), device=own.device)                            # (B, W * B)

    def half(a, same, other):
        logits = torch.cat([a @ other.T, (a @ same.T).masked_fill(itself, float("-inf"))], 1)   # (B, 2 * W * B)
        return F.cross_entropy(logits / temperature, own)
    return (half(z1, all1, all2) + half(z2, all2, all1)) / 2


def patchify(images, patch_size):
    """(B, 3, H, W) -> (B, N, p*p*3), a patch laid out as (row, column, channel)."""
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))   # (B, 3, rows, p, columns, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def pixel_loss(prediction, images, mask, patch_size, normalize=True, total=None):
    """L = mean over hidden patches of the mean squared error of their pixels  (MAE)

    prediction (B, N, p*p*3), images (B, 3, H, W), mask (B, N) bool, True = hidden -> ()
    normalize: each target patch to mean 0 and variance 1 first (MAE's norm_pix_loss).  total (), here and below:
    the number of hidden patches, or rows, of the whole global batch, where this call holds a part of a rank's.
    """
    target = patchify(images.float(), patch_size)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()  # MAE's 1e-6
    error = (prediction.float() - target).square().mean(-1)     # (B, N)
    return _global_mean(error, mask.to(error.dtype), total)


def distillation_loss(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04, total=None):
    """L_Dist = -1/|M| sum_{k in M} softmax(h-bar(f-bar_k))^T log softmax(h(g_k))  (paper, eq. 3; temperatures: iBOT)

    student_logits, teacher_logits (R, K) of the hidden patches, center (K,) -> (); no gradient reaches the teacher
    """
    target = ((teacher_logits.detach().float() - center) / teacher_temp).softmax(-1)
    rows = -(target * (student_logits.float() / student_temp).log_softmax(-1)).sum(-1)   # (R,)
    return _global_mean(rows, torch.ones_like(rows), total)


@torch.no_grad()
def update_center(center, teacher_logits, momentum=0.9):
    """center = momentum * center + (1 - momentum) * mean of the teacher's logits over the rows of ALL ranks  (DINO)

    center (K,) is changed in place; teacher_logits (R, K), or their means over R parts of equal size.  A mean that is
    not finite is left out: it would stay in the center for ever.
    """
    mean = all_sum(teacher_logits.float().sum(0)) / all_sum(torch.full_like(center[0], len(teacher_logits)))
    center.lerp_(torch.where(mean.isfinite(), mean, center), 1 - momentum)


@torch.no_grad()
def codeword_use(teacher_logits, center, teacher_temp=0.04):
    """How the teacher uses its codewords: where all patches fall on a few of them, the targets have collapsed.

    teacher_logits (R, K), center (K,) -> (2, K): the sum over R of its distributions, and 1 where a codeword is the
    most likely one of a row, else 0
    """
    p = ((teacher_logits.float() - center) / teacher_temp).softmax(-1)
    return torch.stack([p.sum(0), torch.zeros_like(center).scatter_(0, p.argmax(-1), 1.0)])  # bincount waits for a GPU


def mlm_loss(logits, targets, total=None):
    """L_MLM = mean over all masked tokens of -log softmax(logits)[target]  (BERT)

    logits (R, V), targets (R,) -> ()
    """
    rows = F.cross_entropy(logits.float(), targets, reduction="none")   # (R,)
    return _global_mean(rows, torch.ones_like(rows), total)
