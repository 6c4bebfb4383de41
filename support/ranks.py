"""How several ranks evaluate one model: each encodes its share, and then all hold all features.

What follows is then as on one rank.  Without torchrun everything here is a plain call.
"""
import torch
import torch.distributed as dist


def rank_and_world():
    """-> number of this process, number of processes"""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shared_out(encode, items):
    """encode(items) -> (n, ...) on CPU, of which each rank does its share.

    Each item is encoded once: repeating some, to even out the shares, would change scores.
    """
    rank, world_size = rank_and_world()
    if world_size == 1:
        return encode(items)
    share = items[rank::world_size]
    part = together(lambda: encode(share) if share else None)
    shape, dtype = on_first_rank(lambda: (part.shape[1:], part.dtype))
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    rows = torch.zeros(len(items), *shape, dtype=dtype, device=device)
    if share:
        rows[rank::world_size] = part.to(device)
    dist.all_reduce(rows)  # a sum to which one rank gives a row, and the others zeros
    return rows.cpu()


def together(function):
    """function() on each rank.  An error of one is raised on all, which else would wait for it."""
    _, world_size = rank_and_world()
    if world_size == 1:
        return function()
    error = None
    try:
        value = function()
    except (OSError, ValueError, torch.OutOfMemoryError) as failure:
        kind = FileNotFoundError if isinstance(failure, FileNotFoundError) else ValueError
        error = kind(str(failure))  # a copy, because not every error can be pickled
    errors = [None] * world_size
    dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error
    return value


def on_first_rank(function):
    """function() on rank 0 -> its value on all ranks, which wait for it."""
    rank, world_size = rank_and_world()
    values = [together(lambda: function() if rank == 0 else None)]
    if world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]
