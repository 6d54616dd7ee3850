"""One sheet that compares pictures: prompt, unpatched, each mode, and below it the difference."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

DIFFERENCE_GAIN = 4
_CELL, _GAP, _TEXT_WIDTH, _MARGIN = 192, 12, 236, 24
# Heights of a line below the title, of one above a column, and of a note's three lines.
_LINE, _COLUMN_LINE, _NOTE = 17, 18, 56
_INK, _GREY, _PAPER = (28, 30, 36), (110, 115, 125), (250, 250, 248)


def sheet(title, notes, columns, rows):
    """Draw the sheet: a title, the names of the columns, and a row for each prompt.

    Args:
        notes: what stands in grey below the title, to be wrapped between its items only.
        columns: [(name, options)] of the pictures, the unpatched one first.
        rows: [(prompt, [(picture, note)])], a picture for each column: (3, h, w) fp32 in 0..1; `note` is a few words.
    Returns: PIL image, RGB; a picture's side is about 192 pixels, enlarged by a whole factor where it is smaller.
    """
    width, height = _enlarged(rows[0][1][0][0]).size
    row_height = height + _GAP // 2 + max(height // 2, _NOTE) + 2 * _GAP
    lines = _filled(notes, _TEXT_WIDTH + len(columns) * (width + _GAP) - _MARGIN, _font(12))
    top = _MARGIN + 28 + len(lines) * _LINE + 2 * _COLUMN_LINE + _GAP
    size = (_TEXT_WIDTH + len(columns) * (width + _GAP) + _MARGIN, top + len(rows) * row_height)
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN, _GAP), title, _INK, _font(17))
    for i, line in enumerate(lines):
        pen.text((_MARGIN, _GAP + 26 + i * _LINE), line, _GREY, _font(12))
    places = [_TEXT_WIDTH + _GAP + i * (width + _GAP) for i in range(len(columns))]
    for x, (name, options) in zip(places, columns, strict=True):
        pen.text((x, top - 2 * _COLUMN_LINE - 4), _cut(name, width, _font(13)), _INK, _font(13))
        pen.text((x, top - _COLUMN_LINE - 2), _cut(options, width, _font(11)), _GREY, _font(11))
    for i, (prompt, cells) in enumerate(rows):
        y = top + i * row_height
        text = "\n".join(textwrap.wrap(prompt, 28, max_lines=6, placeholder=" ..."))
        pen.multiline_text((_MARGIN, y), text, _INK, _font(15), spacing=4)
        for x, (picture, note) in zip(places, cells, strict=True):
            _cell(canvas, pen, x, y, picture, note, cells[0][0])
    return canvas


def _cell(canvas, pen, x, y, picture, note, exact):
    """A picture; below it its difference from the exact one, if it is another, and beside that a note."""
    large = _enlarged(picture)
    canvas.paste(large, (x, y))
    below = y + large.height + _GAP // 2
    if picture is not exact:
        small = _enlarged((picture - exact).abs() * DIFFERENCE_GAIN)
        small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
        canvas.paste(small, (x, below))
        x += small.width + 8
    pen.multiline_text((x, below), note, _INK, _font(13), spacing=5)


def _filled(items, width, font):
    """The items in lines as long as fit."""
    lines = [""]
    for item in items:
        longer = f"{lines[-1]};  {item}" if lines[-1] else item
        if lines[-1] and font.getlength(longer) > width:
            lines.append(item)
        else:
            lines[-1] = longer
    return lines


def _cut(text, width, font):
    """As much of a text as fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


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
