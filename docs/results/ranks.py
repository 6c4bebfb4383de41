"""Mean log2 ranks in retrieval, of the tables of photographs: finer than R@k on 1,000 pictures.

    python docs/results/ranks.py flickr8k/val test runs/*/last.pt

For each checkpoint: the mean of log2 of the rank of a picture's best caption among the captions of
others, and of a caption's picture.  Lower is better; by chance they are 9.0 and 8.5 for 1,000
pictures with five captions each.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
from support import testsets
from support.runtime import run_program


def print_ranks(folder, split, checkpoints):
    """A line for each checkpoint.  Raises OSError, ValueError."""
    paths, texts, owners = testsets.karpathy(folder, split)
    right = torch.arange(len(paths))[:, None] == torch.tensor(owners)    # (pictures, captions)
    for checkpoint in checkpoints:
        model, tokenizer = evaluate.load_model(checkpoint)
        images = F.normalize(evaluate.encode_images(model.encode_image, paths, model), dim=1)
        similarity = images @ evaluate.encode_texts(model, tokenizer, texts).T
        i2t = 1 + evaluate.count_ahead(similarity, right)
        t2i = 1 + evaluate.count_ahead(similarity.T, right.T)
        print(f"{checkpoint}: log2 rank I2T {i2t.log2().mean():.2f}, T2I {t2i.log2().mean():.2f}",
              flush=True)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="pictures and karpathy.json")
    parser.add_argument("split", choices=["val", "test"])
    parser.add_argument("checkpoints", nargs="+")
    args = parser.parse_args()
    run_program("ranks.py", lambda: print_ranks(args.folder, args.split, args.checkpoints))


if __name__ == "__main__":
    main()
