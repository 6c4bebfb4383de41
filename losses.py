"""Every equation of the paper (section 3) and of its baselines as one function.

Ideas: CLIP, SimCLR and SLIP, MAE, BERT, iBOT and DINO.  Symbols: B pairs of this rank, W ranks (the
world size), R rows of this rank (hidden patches or masked words), K codewords, E joint embedding,
e_I and e_T features of length 1, sigma the learned temperature, scale = 1 / sigma.

Each loss takes this rank's rows and is a mean in float32 such that gradients, once DDP has averaged
them over the ranks, equal those of one process with the global batch.  `denominator`, a scalar: the
number of rows in the GLOBAL batch, for a call with some of this rank's rows; such losses add up.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def world_size():
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class AllGather(torch.autograd.Function):
    """(B, E) on each rank -> (W * B, E); dist.all_gather alone has no gradient."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        # Every rank compares with this rank's rows, so every rank has a part of their gradient.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]


def gather(x):
    """(B, E) on each rank, B equal on all -> (W * B, E) in rank order, with gradient."""
    return AllGather.apply(x) if world_size() > 1 else x


def global_rows(x):
    """x (B, E) -> (B,) long: the row numbers of this rank's rows in gather(x)."""
    # The partner of row i is row i of the same rank, which gather puts behind those of lower ranks.
    rank = dist.get_rank() if world_size() > 1 else 0
    return torch.arange(len(x), device=x.device) + rank * len(x)


def all_sum(x):
    """The sum of a small tensor over all ranks, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def global_mean(values, weight, denominator=None):
    """L = W * sum of weight * values over this rank / sum of weight over ALL ranks"""
    # Ranks have different numbers of rows, so a mean of their means is not the global mean.  Each
    # rank divides by the GLOBAL sum of weights instead.  DDP averages the gradients over the ranks,
    # which divides them by W; the factor W cancels that.
    if denominator is None:
        denominator = all_sum(weight.sum())
    # A batch without any weight, such as one without a masked word, has loss 0, not NaN.
    return (values * weight).sum() * world_size() / denominator.clamp(min=1e-9)


def contrastive_loss(image_features, text_features, scale):
    """L_I = -1/B sum_i log softmax_j(e_I(i) . e_T(j) / sigma)[i],  L_T: I and T swapped  (paper)

    image_features, text_features (B, E), not normalised, scale () -> (L_I, L_T); j over ALL ranks
    """
    # float32, because a logit of up to 100 (CLIP's largest scale) has steps of 0.5 in bfloat16.
    e_i = F.normalize(image_features.float(), dim=1)
    e_t = F.normalize(text_features.float(), dim=1)
    target = global_rows(e_i)
    # Logits are (B, W * B), never (W * B, W * B): each rank has the rows of its own pairs.  As B is
    # equal on all ranks, DDP's mean over ranks of means over B is the global mean, without a W.
    loss_i = F.cross_entropy(scale * e_i @ gather(e_t).T, target)
    loss_t = F.cross_entropy(scale * e_t @ gather(e_i).T, target)
    return loss_i, loss_t


@torch.no_grad()
def contrastive_accuracy(image_features, text_features):
    """Share of this rank's B images whose nearest text, of those of ALL ranks, is their own: ()"""
    e_i = F.normalize(image_features.float(), dim=1)
    e_t = F.normalize(text_features.float(), dim=1)
    nearest = (e_i @ gather(e_t).T).argmax(1)                               # (B,)
    return (nearest == global_rows(e_i)).float().mean()


def simclr_loss(z1, z2, temperature=0.1):
    """L = mean over all views z of -log softmax_{z' != z}(z . z' / temperature)[partner of z]

    (SimCLR; temperature: SLIP)  z1, z2 (B, D), not normalised, two views of each image -> ()
    """
    z1 = F.normalize(z1.float(), dim=1)
    z2 = F.normalize(z2.float(), dim=1)
    all1, all2 = gather(z1), gather(z2)                                     # (W * B, D)
    rows = global_rows(z1)
    itself = rows[:, None] == torch.arange(len(all1), device=rows.device)   # (B, W * B)

    def one_side(z, all_same, all_other):
        # The other view comes first, so the partner of row i is in column rows[i].
        other = z @ all_other.T                                             # (B, W * B)
        same = (z @ all_same.T).masked_fill(itself, float("-inf"))          # (B, W * B)
        logits = torch.cat([other, same], 1)                                # (B, 2 * W * B)
        return F.cross_entropy(logits / temperature, rows)

    return (one_side(z1, all1, all2) + one_side(z2, all2, all1)) / 2


def patchify(images, patch_size):
    """(B, 3, height, width) -> (B, N, p*p*3), a patch laid out as (row, column, channel)."""
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, Y, p, X, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)             # (B, Y * X, p*p*3)


def pixel_loss(prediction, images, mask, patch_size, normalize=True, denominator=None):
    """L = mean over hidden patches of the mean of (predicted pixel - pixel)^2  (MAE)

    prediction (B, N, p*p*3), images (B, 3, height, width), mask (B, N) bool, True = hidden -> ()
    """
    target = patchify(images.float(), patch_size)                           # (B, N, p*p*3)
    if normalize:  # MAE's norm_pix_loss, and its 1e-6: a patch's brightness does not count
        deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()            # (B, N, 1)
        target = (target - target.mean(-1, keepdim=True)) / deviation
    error = (prediction.float() - target).square().mean(-1)                 # (B, N)
    return global_mean(error, mask.to(error.dtype), denominator)


def distillation_loss(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04,
                      denominator=None):
    """L_Dist = -1/|M| sum_{k in M} softmax(h-bar(f-bar_k))^T log softmax(h(g_k))  (paper)

    student_logits, teacher_logits (R, K): row r of both is the same hidden patch; center (K,) -> ()
    """
    # Temperatures and center: iBOT.  Without a center all patches may fall on one codeword.
    # detach, because the teacher follows the student by EMA alone (model.ema_update).
    target = ((teacher_logits.detach().float() - center) / teacher_temp).softmax(-1)
    log_student = (student_logits.float() / student_temp).log_softmax(-1)   # (R, K)
    cross_entropy = -(target * log_student).sum(-1)                         # (R,)
    return global_mean(cross_entropy, torch.ones_like(cross_entropy), denominator)


@torch.no_grad()
def update_center(center, teacher_logits, momentum=0.9, finite=True):
    """center = momentum * center + (1 - momentum) * mean of teacher_logits over ALL ranks  (DINO)

    center (K,) changes in place; teacher_logits (R, K), or a row per micro-batch: its mean.
    finite (): False if the step was skipped, which leaves the center as it is.
    """
    rows = all_sum(torch.full_like(center[0], len(teacher_logits)))
    mean = all_sum(teacher_logits.float().sum(0)) / rows                    # (K,)
    # A NaN would stay in the center for ever.
    center.lerp_(torch.where(mean.isfinite() & finite, mean, center), 1 - momentum)


@torch.no_grad()
def codeword_use(teacher_logits, center, teacher_temp=0.04):
    """Which codewords the teacher uses: once all patches fall on a few, its targets say nothing.

    teacher_logits (R, K) -> (2, K): sum over R of its distributions; 1 if most likely in some row
    """
    p = ((teacher_logits.float() - center) / teacher_temp).softmax(-1)      # (R, K)
    # Not bincount, which makes the CPU wait for the GPU.
    used = torch.zeros_like(center).scatter_(0, p.argmax(-1), 1.0)          # (K,)
    return torch.stack([p.sum(0), used])


def mlm_loss(logits, targets, denominator=None):
    """L_MLM = mean over masked words of -log softmax(logits)[target]  (paper; BERT)

    logits (R, vocabulary), targets (R,) long -> ()
    """
    cross_entropy = F.cross_entropy(logits.float(), targets, reduction="none")  # (R,)
    return global_mean(cross_entropy, torch.ones_like(cross_entropy), denominator)
