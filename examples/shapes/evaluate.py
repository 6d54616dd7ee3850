"""How well a pipeline obeys held-out captions, and a sheet of its pictures.

    python examples/shapes/evaluate.py examples/shapes/unet --sheet examples/shapes/samples.png

The sheet's captions are the first 32 with one thing and the first 16 with two, at seeds 0 to 47: nothing is picked out.
"""

import argparse
import json
from pathlib import Path

import grammar
import judge
import metrics
import torch
from sampling import GUIDANCE, STEPS, draw, load, sheet, to_bytes


def obedience(pipe, captions, steps, guidance):
    """{"colour": {"mean", "low", "high"}, ...} over one picture per caption; caption i has seed i."""
    pictures = to_bytes(draw(pipe, captions, seeds=range(len(captions)), steps=steps, guidance=guidance))
    result = {}
    for name, right in judge.verdicts(judge.load(), pictures, captions).items():
        result[name] = metrics.share_with_interval(right.numpy())
    return result


def print_table(rows):
    names = list(next(iter(rows.values())))
    print("| captions | " + " | ".join(names) + " |\n|---" * 1 + "|---" * len(names) + "|")
    for title, row in rows.items():
        cells = [f"{row[name]['mean']:.3f} ({row[name]['low']:.2f}-{row[name]['high']:.2f})" for name in names]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--captions", type=int, default=128, help="captions of each kind")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sheet", type=Path, help="write 6 rows of 8 pictures here")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = load(args.pipeline)
    sets = {name: grammar.held_out_set(args.captions, number) for name, number in (("one thing", 1), ("two things", 2))}
    if args.sheet:
        captions = grammar.held_out_set(128, 1)[:32] + grammar.held_out_set(128, 2)[:16]
        pictures = to_bytes(draw(pipe, captions, seeds=range(48), steps=args.steps, guidance=args.guidance))
        sheet(pictures, columns=8, captions=captions).save(args.sheet, optimize=True)
    rows = {name: obedience(pipe, captions, args.steps, args.guidance) for name, captions in sets.items()}
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
