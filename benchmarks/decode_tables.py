"""Rows of decode.jsonl as tables."""

import measure

NOT_MEASURED = "Not measured yet: `python benchmarks/decode.py --save`."


def latest():
    """The latest row of each number of ranks and size; [] if nothing was measured."""
    if not (measure.RESULTS / "decode.jsonl").exists():
        return []
    return list(
        {(row["nproc"], row["size"]): row for row in measure.read_rows("decode") if row["narrow"] == 1}.values()
    )


def _machine(row):
    return f"{row['device']}, torch {row['torch']}, {row['exchange']}, {row['date']}"


def decoder(table):
    """One rank against all of them; `table` makes Markdown of a header and rows."""
    rows = latest()
    if not rows:
        return NOT_MEASURED
    header = ["ranks, picture", "s alone", "s", "speed-up (paired median), rounds", "peak memory of a decode alone, MB"]
    header += ["of each rank, MB", "MB sent by each rank", "largest difference", "machine"]
    body = [
        [
            f"{row['nproc']}, {row['size']}²",
            f"{row['decode_s_alone']:.1f}",
            f"{row['decode_s']:.1f}",
            f"{row['speedup']:.2f}×, {len(row['speedups'])}",
            f"{row['memory_mb_alone']:.0f}",
            " / ".join(f"{m:.0f}" for m in row["memory_mb"]),
            " / ".join(f"{n / 1e6:.1f}" for n in row["sent_bytes"]),
            f"{row['error']:.1e}",
            _machine(row),
        ]
        for row in rows
    ]
    return table(header, body)


def text_encoder(table):
    """Every rank encodes at once, against rank 0 encoding and sending."""
    rows = latest()
    if not rows:
        return NOT_MEASURED
    header = ["ranks", "every rank encodes, ms", "rank 0 encodes and sends, ms", "machine"]
    body = [
        [row["nproc"], *(f"{row[f'text_{w}_s'] * 1e3:.0f}" for w in ("all", "sent")), _machine(row)] for row in rows
    ]
    return table(header, body)
