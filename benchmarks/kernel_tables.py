"""Rows of the kernels' benchmarks as tables and pictures, beside their goals."""

import goals
import measure
import roofline

# Benchmark → (title, our op, baselines, the ceiling that bounds it).
OPS = {
    "group_norm": (
        "GroupNorm + SiLU + halo rows", "group_norm",
        ("torch", "torch.compile", "DistriFusion's formula", "one program per group"), "share_of_copy",
    ),
    "attention": (
        "Attention over all patches' keys", "attention",
        ("ring, cudnn", "ring, flash", "cat, cudnn", "cat, flash", "cat, torch.compile"), "share_of_matmul",
    ),
    "pointwise": ("The small fusions", "kernel", ("torch", "torch.compile"), "share_of_copy"),
}  # fmt: skip


def kernels(table):
    """The goals of the kernels and what is measured of them, and a table of each benchmark that has rows; `table` makes
    Markdown of a header and rows.
    """
    measured = {name: roofline.latest(name) for name in OPS}
    scripts = ", ".join(f"`bench_{name}.py`" for name in OPS)
    text = [] if any(measured.values()) else [f"Not measured on a GPU yet. What {scripts} are to show:"]
    text.append(
        table(["what", "goal", "measured"], [line for name in OPS for line in goals.lines(name, measured[name])])
    )
    for name, rows in measured.items():
        if rows:
            title, own, baselines, share = OPS[name]
            facts = ", ".join(str(rows[-1][key]) for key in ("device", "torch", "triton", "date"))
            cells = roofline.table_cells(rows, own, baselines, share)
            text += [f"{title} on {facts}; median (range) over shapes.", table(*cells)]
    return "\n\n".join(text)


def save_pictures():
    """A roofline of each benchmark that has rows, beside them."""
    for name, (title, own, _, share) in OPS.items():
        if rows := roofline.latest(name):
            title = f"{title}: share of {roofline.CEILINGS[share]}, {rows[-1]['device']}"
            (measure.RESULTS / f"{name}.svg").write_text(roofline.picture(rows, own, title, share))
