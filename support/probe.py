"""The linear probe of CLIP: logistic regression by L-BFGS, and the search of its penalty."""
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm


def best_penalty(x, y, classes, metric):
    """The penalty with the best score on every fifth training picture, as CLIP searches it.

    Seven from 1e-6 to 1e6, then the interval around the best is halved down to an eighth of a
    decade.  Raises ValueError if there are too few pictures.
    """
    by_class = y.argsort(stable=True) if y.ndim == 1 else torch.arange(len(y))
    held_out = torch.zeros(len(x), dtype=torch.bool)
    held_out[by_class[::5]] = True
    if (~held_out).sum() < 2:
        raise ValueError(f"{len(x)} training pictures are too few for a linear probe")
    tried = {}  # {exponent of 10: score}
    exponents = [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0]
    step = 2.0
    while step >= 1 / 8:
        for exponent in tqdm(exponents, "penalties", disable=None, leave=False):
            if abs(exponent) <= 6:
                scores = probe_scores(x[~held_out], y[~held_out], x[held_out], classes,
                                      10 ** exponent)
                tried[exponent] = metric(scores, y[held_out])
        if any(map(math.isnan, tried.values())):
            raise ValueError(f"the {held_out.sum()} training pictures that are held out give no "
                             "score: they are too few, or of one class")
        best = max(tried, key=tried.get)
        step = step / 2
        exponents = [best - step, best + step]
    return 10 ** best


def probe_scores(x, y, x_test, classes, penalty):
    """Class scores of x_test (m, D) by a regression on x, y -> (m, C) on CPU"""
    logits = logistic_regression(x, y, classes, penalty)(x_test).double()
    return logits.softmax(1) if y.ndim == 1 else logits


def logistic_regression(x, y, classes, penalty):
    """Minimise the SUM of cross-entropies + penalty / 2 * |W|^2 by L-BFGS (CLIP).

    x (n, D); y (n,), or (n, C) of 0 and 1 for one regression per class -> function (m, D) -> logits
    (m, C) on CPU.  The steps are taken on features of mean 0 and deviation 1, where they are few;
    the minimum is that of the raw ones.  scikit-learn's C is 1 / penalty.
    """
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    x = (x - mean) / std
    y = y.to(x.device)
    loss_of = F.cross_entropy
    if y.ndim > 1:
        y = y.float()
        loss_of = F.binary_cross_entropy_with_logits
    size = 2 ** 28 // classes  # rows at a time, whose logits take 1 GiB: our choice
    weight = torch.zeros(x.size(1), classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000,  # CLIP
                                  tolerance_grad=1e-6, tolerance_change=1e-9,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = 0
        for rows, labels in zip(x.split(size), y.split(size), strict=True):
            loss = loss_of(rows @ weight + bias, labels, reduction="sum") / len(x)
            loss.backward()
            total += loss.detach()
        loss = penalty / 2 / len(x) * (weight / std[:, None]).square().sum()
        loss.backward()
        return total + loss.detach()
    optimizer.step(closure)
    weight = weight.detach()
    bias = bias.detach()
    return lambda rows: ((rows.to(x.device) - mean) / std @ weight + bias).cpu()
