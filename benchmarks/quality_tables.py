"""What `quality.py` writes: JSON, a table in Markdown, and a grid of pictures."""

import json

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sampling import sheet, to_bytes

ASPECTS = ("colour", "shape", "background")
GRID_COLUMNS = 8


def as_json(result):
    """JSON with one line per configuration and per pair, so that two runs can be compared by diff."""
    parts = [json.dumps({k: v for k, v in result.items() if k not in ("rows", "pairs")}, ensure_ascii=False)[:-1]]
    for part in ("rows", "pairs"):
        lines = [
            f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(row)}" for name, row in result.get(part, {}).items()
        ]
        if lines:
            parts.append(f' "{part}": {{\n' + ",\n".join(lines) + "\n }")
    return ",\n".join(parts) + "}\n"


def as_markdown(result):
    """The table, and one line on what was drawn."""
    heads = ["configuration", "PSNR dB", "median", "worst", "SSIM", "worst", "obeyed", "only by exact"]
    heads += [*ASPECTS, "Frechet", "− exact"]
    lines = [result["title"] + " " + result["note"], "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in result["rows"].items():
        psnr, ssim, obeyed, frechet = row["psnr_db"], row["ssim"], row["obedience"], row["frechet"]
        cells = [f"`{name}`", _cell(psnr, 1), f"{psnr['median']:.1f}", f"{psnr['worst']:.1f}"]
        cells += [
            _cell(ssim, 4),
            f"{ssim['worst']:.3f}",
            _cell(obeyed["all"], 2),
            _cell(row["obeyed_by_exact_only"], 2),
        ]
        cells += [f"{obeyed[aspect]['mean']:.2f}" for aspect in ASPECTS]
        cells += [_cell(frechet, 1), _cell(frechet["minus_exact"], 1)]
        lines.append("| " + " | ".join(cells) + " |")
    if result.get("pairs"):
        lines += ["", "PSNR of one way minus that of another, picture by picture:", ""]
        lines += ["| one − another | dB | pictures closer |", "|---|---|---|"]
        for name, pair in result["pairs"].items():
            ours, theirs = name.split(" − ")
            lines.append(f"| `{ours}` − `{theirs}` | {_cell(pair, 1)} | {pair['closer']:.2f} |")
    return "\n".join(lines) + "\n"


def _cell(row, digits):
    return f"{row['mean']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def grid(pictures_of, rows, num_seeds):
    """A picture with a row per configuration; the left half shows the first prompts, the right half what suffered most.

    Those are the pictures whose PSNR, averaged over all configurations, is lowest.
    """
    half = GRID_COLUMNS // 2
    hardest = np.argsort(np.mean([row["psnr_db"]["each"] for row in rows.values()], axis=0))
    columns = [*range(0, half * num_seeds, num_seeds), *hardest[:half]]
    strips = [sheet(to_bytes(torch.from_numpy(p[columns])), len(columns), scale=1, gap=2) for p in pictures_of.values()]
    left, height = 250, strips[0].height
    canvas = Image.new("RGB", (left + strips[0].width, height * len(strips)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for idx, (name, strip) in enumerate(zip(pictures_of, strips, strict=True)):
        canvas.paste(strip, (left, idx * height))
        pen.text((4, idx * height + height // 2 - 6), name, "black", font)
    return canvas
