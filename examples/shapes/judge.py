"""A small classifier that reads a picture back, and says whether a caption was obeyed.

It names the number of things, their layout, the background and, for each thing, colour, shape and stripes. The things
are named in reading order: left before right, upper before lower. `train_judge.py` trains it on rendered pictures;
`tests/test_shapes.py` holds it against rendered truth.
"""

from pathlib import Path

import grammar
import torch
from safetensors.torch import load_file

WEIGHTS = Path(__file__).parent / "judge.safetensors"
CHANNELS = (24, 32, 48, 64, 64, 64, 32)
STRIDES = (2, 1, 2, 1, 2, 1, 2)
NUM_FEATURES = 64
OBJECT_HEADS = {"colour": len(grammar.COLOURS), "shape": len(grammar.SHAPES), "striped": 2}
HEADS = {
    "two": 2,
    "vertical": 2,
    "background": len(grammar.BACKGROUNDS),
    **{f"{name}_{idx}": size for idx in (0, 1) for name, size in OBJECT_HEADS.items()},
}


class Judge(torch.nn.Module):
    """Seven 3x3 convolutions, a hidden layer (the features of the Frechet distance), one linear layer for all heads."""

    def __init__(self):
        super().__init__()
        layers, width_in = [], 5
        for width, stride in zip(CHANNELS, STRIDES, strict=True):
            layers += [torch.nn.Conv2d(width_in, width, 3, stride, 1), torch.nn.GroupNorm(8, width), torch.nn.SiLU()]
            width_in = width
        self.convolutions = torch.nn.Sequential(*layers)
        self.hidden = torch.nn.Linear(CHANNELS[-1] * 4 * 4, NUM_FEATURES)
        self.heads = torch.nn.Linear(NUM_FEATURES, sum(HEADS.values()))

    def features(self, pixels):
        """(n, 3, 64, 64) in -1..1 -> (n, 64)."""
        n, _, height, width = pixels.shape
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        place = torch.stack([x, y]).expand(n, -1, -1, -1)
        maps = self.convolutions(torch.cat([pixels, place], 1))
        return torch.nn.functional.silu(self.hidden(maps.flatten(1)))

    def forward(self, pixels):
        """(n, 3, 64, 64) in -1..1 -> {head: (n, number of classes) logits}."""
        logits = self.heads(self.features(pixels)).split(list(HEADS.values()), 1)
        return dict(zip(HEADS, logits, strict=True))


def to_pixels(pictures):
    """(n, 3, 64, 64) uint8 -> -1..1 float."""
    return pictures.float() / 127.5 - 1


def load(path=WEIGHTS):
    """The trained judge, fp32."""
    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def truth(captions):
    """{head: (n,) int64}: what the heads should say. What a caption does not have is -1: it is not asked for."""
    rows = [_truth_row(caption) for caption in captions]
    return {head: torch.tensor([row.get(head, -1) for row in rows]) for head in HEADS}


def _truth_row(caption):
    things = caption.things[::-1] if caption.relation in ("right of", "below") else caption.things
    row = {"two": len(things) - 1, "background": grammar.BACKGROUNDS.index(caption.background)}
    if caption.relation:
        row["vertical"] = int(caption.relation in ("above", "below"))
    for idx, thing in enumerate(things):
        row[f"colour_{idx}"] = grammar.COLOURS.index(thing.colour)
        row[f"shape_{idx}"] = grammar.SHAPES.index(thing.shape)
        row[f"striped_{idx}"] = int(thing.striped)
    return row


@torch.no_grad()
def verdicts(judge, pictures, captions):
    """What each picture obeys of its caption.

    Args:
        pictures: (n, 3, 64, 64) uint8.
    Returns: {"count" | "background" | "layout" | "colour" | "shape" | "striped" | "all": (n,) bool}. Of two things both
        must be right; a single thing's layout always is.
    """
    logits, wanted = judge(to_pixels(pictures)), truth(captions)
    right = {head: (logits[head].argmax(1) == wanted[head]) | (wanted[head] < 0) for head in HEADS}
    result = {"count": right["two"], "background": right["background"], "layout": right["vertical"]}
    for name in OBJECT_HEADS:
        result[name] = right[f"{name}_0"] & right[f"{name}_1"]
    result["all"] = torch.stack(list(result.values())).all(0)
    return result
