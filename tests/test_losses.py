"""Every loss against a naive loop, and two gloo processes against one."""
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import losses
from model import SyncBatchNorm


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def test_contrastive_loss_equals_a_loop():
    image, text, scale = rows(5, 7), rows(5, 7, seed=1), 3.0
    e = [[math.exp(scale * cosine(image[i], text[j])) for j in range(5)] for i in range(5)]
    expected_i = expected_t = 0.0
    for i in range(5):
        expected_i -= math.log(e[i][i] / sum(e[i][j] for j in range(5))) / 5
        expected_t -= math.log(e[i][i] / sum(e[j][i] for j in range(5))) / 5
    loss_i, loss_t = losses.contrastive_loss(image, text, torch.tensor(scale))
    assert loss_i.item() == pytest.approx(expected_i, rel=1e-5)
    assert loss_t.item() == pytest.approx(expected_t, rel=1e-5)


def test_simclr_loss_equals_a_loop():
    z = [*rows(4, 6), *rows(4, 6, seed=1)]
    expected = 0.0
    for i in range(8):
        partner = (i + 4) % 8
        denominator = sum(math.exp(cosine(z[i], z[j]) / 0.3) for j in range(8) if j != i)
        expected -= math.log(math.exp(cosine(z[i], z[partner]) / 0.3) / denominator) / 8
    loss = losses.simclr_loss(torch.stack(z[:4]), torch.stack(z[4:]), 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_pixel_loss_equals_a_loop_over_pixels(normalize):
    p, images = 4, rows(2, 3, 8, 12)
    prediction = rows(2, 6, p * p * 3, seed=1)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    total, count = 0.0, 0
    for b in range(2):
        for n in range(6):
            top, left = n // 3 * p, n % 3 * p
            target = [images[b, c, top + y, left + x].item()
                      for y in range(p) for x in range(p) for c in range(3)]
            if normalize:
                mean = sum(target) / len(target)
                var = sum((t - mean) ** 2 for t in target) / (len(target) - 1)
                target = [(t - mean) / math.sqrt(var + 1e-6) for t in target]
            if mask[b, n]:
                squares = [(prediction[b, n, k].item() - t) ** 2 for k, t in enumerate(target)]
                total += sum(squares) / len(squares)
                count += 1
    loss = losses.pixel_loss(prediction, images, mask, p, normalize)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_distillation_loss_equals_a_loop_and_gives_the_teacher_no_gradient():
    student, teacher = rows(3, 5).requires_grad_(), rows(3, 5, seed=1).requires_grad_()
    center = rows(5, seed=2)
    expected = 0.0
    for r in range(3):
        t = [math.exp((teacher[r, k].item() - center[k].item()) / 0.5) for k in range(5)]
        s = [math.exp(student[r, k].item() / 0.2) for k in range(5)]
        expected -= sum(t[k] / sum(t) * math.log(s[k] / sum(s)) for k in range(5)) / 3
    loss = losses.distillation_loss(student, teacher, center, 0.2, 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_center_is_the_running_mean_of_finite_means_of_steps_that_count():
    center, logits = rows(5), rows(6, 5, seed=1)
    before = center.clone()
    means = [sum(logits[r, k].item() for r in range(6)) / 6 for k in range(5)]
    expected = [0.9 * center[k].item() + 0.1 * means[k] for k in range(5)]
    losses.update_center(center, logits, finite=torch.tensor(False))
    assert torch.equal(center, before)
    logits[2, 3], expected[3] = math.inf, center[3].item()
    losses.update_center(center, logits)
    assert center.tolist() == pytest.approx(expected, rel=1e-5)


def test_codeword_use_equals_a_loop():
    logits, center = rows(6, 5, seed=1), rows(5, seed=2)
    distribution, used = [0.0] * 5, [0] * 5
    for r in range(6):
        t = [math.exp((logits[r, k].item() - center[k].item()) / 0.5) for k in range(5)]
        distribution = [x + y / sum(t) for x, y in zip(distribution, t)]
        used[t.index(max(t))] = 1
    use = losses.codeword_use(logits, center, 0.5)
    assert use[0].tolist() == pytest.approx(distribution, rel=1e-5)
    assert use[1].tolist() == used and 1 < sum(used) < 5


def test_accuracy_counts_the_pictures_whose_own_text_is_nearest():
    image = rows(6, 4, seed=6)
    text = 5 * (image + rows(6, 4, seed=56))  # longer, and near in angle for some
    hits = sum(max(range(6), key=lambda j: cosine(image[i], text[j])) == i for i in range(6))
    assert hits == 4 and losses.contrastive_accuracy(image, text).item() == pytest.approx(4 / 6)


def test_parts_of_a_loss_add_up_to_the_whole():
    """With `denominator`, the masked losses of two uneven parts sum to that of both."""
    a, b, center = rows(5, 6), rows(5, 6, seed=1), rows(6, seed=2)
    targets = torch.tensor([0, 5, 2, 2, 1])
    images, prediction = rows(5, 3, 2, 2, seed=3), rows(5, 1, 12, seed=4)
    mask = torch.tensor([1, 1, 0, 1, 0]).bool()[:, None]
    of = dict(distill=lambda s, **how: losses.distillation_loss(a[s], b[s], center, **how),
              mlm=lambda s, **how: losses.mlm_loss(a[s], targets[s], **how),
              pixel=lambda s, **how: losses.pixel_loss(prediction[s], images[s], mask[s], 2, **how))
    for name, loss in of.items():
        count = torch.tensor(3.0 if name == "pixel" else 5.0)
        parts = loss(slice(0, 2), denominator=count) + loss(slice(2, 5), denominator=count)
        assert parts.item() == pytest.approx(loss(slice(0, 5)).item(), rel=1e-5), name


def test_mlm_loss_equals_a_loop_and_no_masked_token_is_no_loss():
    logits, targets = rows(4, 6), torch.tensor([0, 5, 2, 2])
    expected = 0.0
    for r in range(4):
        denominator = sum(math.exp(logits[r, v]) for v in range(6))
        expected -= math.log(math.exp(logits[r, targets[r]]) / denominator) / 4
    assert losses.mlm_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    assert losses.mlm_loss(logits[:0], targets[:0]).item() == 0.0


# ---------------------------------------------------------------- two processes equal one

def global_losses(weight, x, share):
    """All losses of a small linear model on this share of the global batch x.  -> {name: ()}"""
    image, text = x[share] @ weight, (x[share] * 2 - 1) @ weight
    teacher = x[share].roll(1, 1) @ weight.detach() + 0.3
    ragged = x[share][x[share][:, 0] > 0] @ weight  # another number of rows on each rank
    norm = SyncBatchNorm(weight.size(1))
    loss_i, loss_t = losses.contrastive_loss(image, text, torch.tensor(5.0))
    return dict(image=loss_i, text=loss_t, simclr=losses.simclr_loss(image, text, 0.5),
                norm=losses.simclr_loss(norm(image), norm(text), 0.5),
                distill=losses.distillation_loss(image, teacher, torch.zeros(weight.size(1))),
                mlm=losses.mlm_loss(ragged, torch.zeros(len(ragged), dtype=torch.long)),
                pixel=losses.pixel_loss(image[:, None, :], x[share][:, :3, None, None],
                                        x[share][:, :1] > 0, 1))


def problem():
    x = rows(6, 12, seed=4)
    # Ragged: in some losses three rows of rank 0 count, and one of rank 1.
    x[:, 0] = torch.tensor([1.0, 1, 1, 1, -1, -1])
    return x, rows(12, 3, seed=5)


def process(rank, port, queue):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, start = problem()
    share = slice(3 * rank, 3 * rank + 3)
    for name in global_losses(start, x, share):
        weight = start.clone().requires_grad_()
        loss = global_losses(weight, x, share)[name]
        loss.backward()
        result = torch.cat([weight.grad.flatten(), loss.detach()[None]])
        dist.all_reduce(result)  # as DDP: the mean over ranks
        if rank == 0:
            queue.put((name, (result / 2).tolist()))
    center = torch.zeros(3)
    losses.update_center(center, (x @ start)[share])
    queue.put((f"center {rank}", center.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_in_loss_gradient_and_center():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(process, (port, queue), nprocs=2, join=False)
    got = dict(queue.get() for _ in range(7 + 2))
    context.join()
    x, start = problem()
    for name in global_losses(start, x, slice(None)):
        weight = start.clone().requires_grad_()
        loss = global_losses(weight, x, slice(None))[name]
        loss.backward()
        expected = [*weight.grad.flatten().tolist(), loss.item()]
        assert got[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    center = torch.zeros(3)
    losses.update_center(center, x @ start)
    assert got["center 0"] == got["center 1"] == pytest.approx(center.tolist(), rel=1e-5)


def test_sync_batch_norm_alone_is_batch_norm():
    x = rows(6, 4) * 3 + 1
    expected = F.batch_norm(x, None, None, training=True)
    assert torch.allclose(SyncBatchNorm(4)(x), expected, atol=1e-5)
