"""One sheet that compares pictures: prompt, unpatched, patched, and their difference."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

DIFFERENCE_GAIN = 4
_CELL, _GAP, _TEXT_WIDTH, _TOP = 192, 12, 236, 76
_INK, _GREY, _PAPER = (28, 30, 36), (110, 115, 125), (250, 250, 248)


def sheet(title, subtitle, rows):
    """Draw the sheet: a title, the names of the columns, and a row for each prompt.

    Args:
        rows: [(prompt, note, unpatched, patched)]; pictures are (3, h, w) fp32 in 0..1, `note` a few words in grey.
    Returns: PIL image, RGB; a picture's side is about 192 pixels, enlarged by a whole factor where it is smaller.
    """
    cells = [[_enlarged(p) for p in (a, b, ((a - b).abs() * DIFFERENCE_GAIN))] for _, _, a, b in rows]
    width, height = cells[0][0].size
    size = (_TEXT_WIDTH + 3 * (width + _GAP) + 2 * _GAP, _TOP + len(rows) * (height + _GAP) + _GAP)
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((2 * _GAP, _GAP), title, _INK, _font(17))
    pen.text((2 * _GAP, _GAP + 22), subtitle, _GREY, _font(12))
    columns = [_TEXT_WIDTH + _GAP + i * (width + _GAP) for i in range(3)]
    names = ("unpatched", "patched", f"difference x {DIFFERENCE_GAIN}")
    for x, name in zip((2 * _GAP, *columns), ("prompt", *names), strict=True):
        pen.text((x, _TOP - 20), name, _INK, _font(13))
    for i, ((prompt, note, _, _), pictures) in enumerate(zip(rows, cells, strict=True)):
        y = _TOP + i * (height + _GAP)
        _write(pen, y, prompt, note)
        for x, picture in zip(columns, pictures, strict=True):
            canvas.paste(picture, (x, y))
    return canvas


def _write(pen, y, prompt, note):
    """A prompt, wrapped, with its note below."""
    text = "\n".join(textwrap.wrap(prompt, 28, max_lines=6, placeholder=" …"))
    left, font = 2 * _GAP, _font(15)
    pen.multiline_text((left, y), text, _INK, font, spacing=4)
    below = pen.multiline_textbbox((left, y), text, font, spacing=4)[3]
    pen.multiline_text((left, below + 10), note, _GREY, _font(12), spacing=4)


def _enlarged(picture):
    """(3, h, w) in 0..1 as a PIL image, about as wide as a cell: small ones pixel by pixel, large ones smoothly."""
    data = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(data)
    if image.width <= _CELL:
        factor = _CELL // image.width
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((_CELL, max(1, image.height * _CELL // image.width)), Image.Resampling.LANCZOS)


def _font(size):
    # Pillow's own font, which is there everywhere; it has no signs beyond Latin-1.
    return ImageFont.load_default(size)
