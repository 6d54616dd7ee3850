"""Calls of GroupNorm of a patch: every mode, memory format, dtype and border, at awkward sizes."""

import dataclasses

import torch
from norm_oracle import affine_inputs, laid_out

EPS = 1e-5
HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `x` is random with mean 3 and deviation 2; a halo row not at `edge` comes from a neighbour."""

    shape: tuple = (2, 24, 5, 7)
    groups: int = 4
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    mode: str = "local"
    bessel: bool = False
    shares: tuple | None = None
    halo: tuple = (0, 0)
    edge: str = ""
    act: str = "silu"
    upsample: int = 1
    tokens: bool = False
    plain: bool = False

    def __str__(self):
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != default[k]).replace("torch.", "") or "default"


RESNET = Case(mode="corrected", bessel=True, shares=(0.25, 0.5, 0.25), halo=(1, 1))
CASES = [
    *(
        dataclasses.replace(RESNET, layout=layout, dtype=dtype)
        for layout in ("contiguous", "channels_last")
        for dtype in (torch.float32, *HALF)
    ),
    Case(),
    Case(plain=True, act="none"),
    Case(mode="sync", shares=(0.2, 0.3, 0.5)),
    Case(mode="stale", shares=(0.2, 0.3, 0.5)),
    Case(mode="stale"),
    Case(mode="corrected"),
    Case(halo=(1, 1), edge="above"),
    Case(halo=(2, 1), edge="below", layout="channels_last"),
    Case(halo=(1, 0)),
    Case(halo=(1, 0), shape=(1, 8, 1, 9)),
    Case(tokens=True, act="none"),
    Case(tokens=True, layout="channels_last"),
    Case(upsample=2, halo=(1, 1)),
    Case(upsample=2, halo=(1, 1), edge="above", layout="channels_last", act="none"),
    # More chunks than one, the last one short; widths in and not in multiples of 8.
    Case(shape=(1, 20, 17, 31), groups=2, halo=(1, 1)),
    Case(shape=(1, 20, 15, 40), groups=2, halo=(1, 1), dtype=torch.bfloat16),
    Case(shape=(1, 20, 17, 31), groups=2, halo=(1, 1), layout="channels_last"),
    # Chunks, or groups, of several tiles, the last one short.
    Case(shape=(1, 20, 70, 71), groups=2),
    Case(shape=(1, 20, 70, 71), groups=2, layout="channels_last", dtype=torch.float16),
    # A tile's 64 channels are not enough, nor do they divide the 80; groups of 40.
    Case(shape=(1, 80, 3, 5), groups=2, halo=(1, 1), layout="channels_last"),
    Case(shape=(2, 12, 37), groups=3),
    Case(shape=(2, 12, 3, 5, 6), groups=3, mode="corrected"),
    Case(shape=(2, 12, 3, 5, 6), groups=3, layout="frames"),
    Case(shape=(1, 12, 2, 13, 23), groups=3, layout="frames", tokens=True),
    Case(shape=(2, 12, 3, 5, 6), groups=3, layout="channels_last"),
    Case(shape=(2, 8, 1, 1), groups=4),
    Case(shape=(1, 4, 3, 3), groups=4),
]


def inputs(case):
    """(x, weight, bias, keyword arguments) of a case, without border buffers."""
    make = torch.Generator().manual_seed(0)
    n, c = case.shape[:2]
    x = laid_out((torch.randn(case.shape, generator=make) * 2 + 3).to(case.dtype), case.layout)
    keywords = {"act": case.act, "mode": case.mode, "bessel": case.bessel}
    if not case.plain:
        keywords |= affine_inputs(n, c, case.dtype, make)
    weight, bias = keywords.pop("weight", None), keywords.pop("bias", None)
    if case.mode != "local":
        parts = torch.randn(3, n, case.groups, 2, generator=make)
        keywords |= {"parts": torch.stack((parts[..., 0], parts[..., 1].abs() * 4), dim=3), "own": 1}
        keywords["shares"] = None if case.shares is None else torch.tensor(case.shares)
    if any(case.halo) or case.upsample > 1:
        keywords |= {"halo": case.halo, "upsample": case.upsample}
        for name, count in zip(("above", "below"), case.halo, strict=True):
            if count and case.edge != name:
                rows = torch.randn(n, c, -(-count // case.upsample), case.shape[3], generator=make).to(case.dtype)
                keywords[name] = laid_out(rows, case.layout)
    return x, weight, bias, keywords
