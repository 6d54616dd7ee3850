"""Draws the picture of a caption: 64x64 RGB, every pixel computed from signed distances, many pictures at a time.

A picture is a background (gradient, soft noise, for some a ground or a glow), then each thing: a soft shadow, then the
filled shape with shading, highlight and perhaps stripes. Place, size, tilt and tint vary within what the caption
allows. Coordinates are pixels from the top left corner; colours are 0..1 until the last line.
"""

import math

import grammar
import torch
import torch.nn.functional as F

SIZE = 64

COLOUR_RGB = torch.tensor(
    [
        (0.85, 0.10, 0.12),  # red
        (0.97, 0.52, 0.08),  # orange
        (0.97, 0.90, 0.15),  # yellow
        (0.12, 0.62, 0.20),  # green
        (0.12, 0.25, 0.88),  # blue
        (0.55, 0.15, 0.70),  # purple
        (0.96, 0.96, 0.96),  # white
    ]
)
# One row per background: sunset, sky, night, field, desert.
TOP_RGB = torch.tensor(
    [(0.30, 0.16, 0.45), (0.25, 0.52, 0.90), (0.02, 0.03, 0.12), (0.60, 0.80, 0.97), (0.72, 0.85, 0.92)]
)
BOTTOM_RGB = torch.tensor(
    [(0.99, 0.62, 0.35), (0.82, 0.93, 0.99), (0.12, 0.12, 0.34), (0.80, 0.92, 0.99), (0.95, 0.90, 0.80)]
)
GROUND_RGB = torch.tensor([(0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.28, 0.52, 0.20), (0.86, 0.70, 0.42)])
HAS_GROUND = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
NIGHT = grammar.BACKGROUNDS.index("night")


def render(captions, seed, batch_size=256):
    """Draw one picture per caption.

    Args:
        captions: `grammar.Caption`s.
        seed: the same captions and seed give the same pictures.
    Returns: (n, 3, 64, 64) uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, len(captions), batch_size)
    return torch.cat([_render_batch(captions[start : start + batch_size], generator) for start in starts])


def _render_batch(captions, generator):
    image = _background([caption.background for caption in captions], generator)
    for thing in _placed_things(captions, generator):
        image = _draw(image, thing, generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _uniform(low, high, n, generator):
    return low + (high - low) * torch.rand(n, 1, 1, generator=generator)


def _tint(rgb, spread, generator):
    """(n, 3) colours, each channel made a little brighter or darker: (n, 3, 1, 1)."""
    return rgb[:, :, None, None] * (1 + spread * torch.randn(*rgb.shape, 1, 1, generator=generator))


def _pixel_centres():
    """x and y of every pixel's centre, (1, 64, 64) each."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    return x[None], y[None]


def _background(names, generator):
    """(n, 3, 64, 64): sky gradient and clouds, then ground with waves of light, then the moon's glow at night."""
    n, (x, y) = len(names), _pixel_centres()
    idx = torch.tensor([grammar.BACKGROUNDS.index(name) for name in names])
    has_ground = HAS_GROUND[idx].view(n, 1, 1)
    top, bottom, ground = (_tint(rows[idx], 0.06, generator) for rows in (TOP_RGB, BOTTOM_RGB, GROUND_RGB))
    horizon = _uniform(0.55, 0.68, n, generator)
    depth = (y / SIZE / torch.where(has_ground > 0, horizon, 1.0)).clamp(0, 1)
    image = top + (bottom - top) * depth[:, None]
    clouds = F.interpolate(torch.randn(n, 1, 8, 5, generator=generator), (SIZE, SIZE), mode="bicubic")
    image = image + 0.035 * clouds

    tilt = _uniform(-0.05, 0.05, n, generator) * (x / SIZE - 0.5)
    below_horizon = (has_ground * torch.sigmoid((y / SIZE - horizon - tilt) * SIZE * 1.3))[:, None]
    bend = 2.5 * torch.sin(x / SIZE * 2 * math.pi + _uniform(0, 2 * math.pi, n, generator))
    waves = torch.sin((y + bend) * 2 * math.pi / _uniform(5, 8, n, generator))
    lit_ground = ground * ((1 + 0.09 * waves) * (0.75 + 0.25 * y / SIZE))[:, None]
    image = image * (1 - below_horizon) + lit_ground * below_horizon

    squared_distance = (x - _uniform(8, 56, n, generator)) ** 2 + (y - _uniform(4, 14, n, generator)) ** 2
    glow = torch.exp(-squared_distance / _uniform(60, 140, n, generator)) * (idx == NIGHT).view(n, 1, 1)
    return image + 0.35 * glow[:, None]


def _placed_things(captions, generator):
    """Two dicts, of all first and all second things: what they are, centre, radius, and 1 where they exist."""
    n = len(captions)
    two = torch.tensor([float(caption.second is not None) for caption in captions]).view(n, 1, 1)
    # Unit vector from the picture's centre to the first thing.
    ways = {None: (0, 0), "left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    way = torch.tensor([ways[caption.relation] for caption in captions], dtype=torch.float32).view(n, 2, 1, 1)
    distance = _uniform(14.5, 16.5, n, generator)
    for idx in range(2):
        # A single thing has more room, so it is larger and wanders further.
        alone = 1 - two if idx == 0 else torch.zeros_like(two)
        sign = 1 if idx == 0 else -1
        x = SIZE / 2 + sign * way[:, 0] * distance + _uniform(-2, 2, n, generator) * (1 + 3 * alone)
        y = SIZE / 2 + sign * way[:, 1] * distance + _uniform(-2, 2, n, generator) * (1 + 2.5 * alone)
        radius = torch.where(alone > 0, _uniform(13, 20, n, generator), _uniform(9.5, 12.5, n, generator))
        things = [caption.second or caption.first if idx else caption.first for caption in captions]
        yield {
            "colour": torch.tensor([grammar.COLOURS.index(thing.colour) for thing in things]),
            "shape": torch.tensor([grammar.SHAPES.index(thing.shape) for thing in things]),
            "striped": torch.tensor([float(thing.striped) for thing in things]).view(n, 1, 1),
            "exists": two if idx else torch.ones_like(two),
            "centre": (x, y),
            "radius": radius,
        }


def _draw(image, thing, generator):
    """Lay the shadow and then the thing itself over `image`."""
    n, (x, y), radius = len(image), _pixel_centres(), thing["radius"]
    dx, dy = x - thing["centre"][0], y - thing["centre"][1]
    angle = _uniform(-0.18, 0.18, n, generator)
    u, v = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
    shadow = torch.sigmoid(-_distance(u - 0.22 * radius, v - 0.28 * radius, thing["shape"], radius) / 1.8)
    image = image * (1 - 0.42 * shadow * thing["exists"])[:, None]

    light = 1.02 - 0.32 * (dx + dy) / (2 * radius)
    bands = torch.sigmoid(4 * torch.sin((0.5 * u + v) * 2 * math.pi / 6)) * thing["striped"]
    highlight = torch.exp(-((dx + 0.4 * radius) ** 2 + (dy + 0.4 * radius) ** 2) / (0.12 * radius**2))
    paint = _tint(COLOUR_RGB[thing["colour"]], 0.05, generator) * (light * (1 - 0.55 * bands))[:, None]
    paint = paint + 0.30 * highlight[:, None]
    cover = (torch.sigmoid(-2.2 * _distance(u, v, thing["shape"], radius)) * thing["exists"])[:, None]
    return image * (1 - cover) + paint * cover


def _distance(u, v, shape_idx, radius):
    """Signed distance in pixels to the edge of each picture's shape, below 0 inside; exact for circle and ring only.

    Args:
        u, v: (n, 64, 64), pixels from the shape's centre, in its own turned axes.
        shape_idx: (n,), index into `grammar.SHAPES`. radius: (n, 1, 1), pixels.
    """
    length = (u * u + v * v + 1e-6).sqrt()
    lowered = v - 0.15 * radius
    fifth = 2 * math.pi / 5
    # 0 at the five points of the star, 1 halfway between two.
    from_point = (torch.remainder(torch.atan2(u, -v) + fifth / 2, fifth) - fifth / 2).abs() / (fifth / 2)
    distances = {
        "circle": length - radius,
        "square": torch.maximum(u.abs(), v.abs()) - 0.82 * radius,
        "triangle": torch.maximum((math.sqrt(3) * u.abs() - lowered - radius) / 2, lowered - 0.62 * radius),
        "ring": (length - 0.74 * radius).abs() - 0.27 * radius,
        "star": 0.62 * (length - 1.12 * radius * (1 - 0.55 * from_point)),
    }
    stacked = torch.stack([distances[name] for name in grammar.SHAPES], 1)
    return stacked.gather(1, shape_idx.view(-1, 1, 1, 1).expand(-1, 1, *stacked.shape[2:]))[:, 0]
