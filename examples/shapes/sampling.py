"""Pictures from a pipeline: one seed per picture, and many pictures on one sheet."""

import textwrap

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

STEPS = 50
GUIDANCE = 5.0


def load(folder, dtype=torch.float32):
    """The pipeline in `folder`, without its progress bar."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, captions, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=16):
    """Sample one picture per caption; a picture depends on its own seed, not on its neighbours in the batch.

    Returns: (n, 3, 64, 64) fp32 in 0..1.
    """
    pictures = []
    for start in range(0, len(captions), batch_size):
        chosen = slice(start, start + batch_size)
        output = pipe(
            [str(caption) for caption in captions[chosen]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[chosen]],
            output_type="pt",
        )
        pictures.append(output.images.float())
    return torch.cat(pictures)


def to_bytes(pictures):
    """0..1 -> uint8, as a saved picture has it."""
    return (pictures * 255).round().to(torch.uint8)


def sheet(pictures, columns, captions=None, scale=2, gap=4):
    """Lay (n, 3, h, w) uint8 pictures out in rows on white, each with its caption below, as a PIL image."""
    n, _, height, width = pictures.shape
    height, width, text_height = height * scale, width * scale, 40 if captions else 0
    font = ImageFont.load_default(size=10)
    size = (columns * (width + gap) + gap, -(-n // columns) * (height + text_height + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for idx, picture in enumerate(pictures):
        corner = gap + idx % columns * (width + gap), gap + idx // columns * (height + text_height + gap)
        canvas.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height), Image.NEAREST), corner)
        if captions:
            lines = textwrap.wrap(str(captions[idx]), 25)
            pen.multiline_text((corner[0], corner[1] + height + 1), "\n".join(lines), "black", font, spacing=0)
    return canvas
