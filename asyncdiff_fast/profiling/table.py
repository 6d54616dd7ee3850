"""Where a step's time goes, as a table for people."""

NOTHING = "no call of a patched denoiser was seen: call patch(pipe) before, and the pipeline within the block"
# A share of a step from which on something is said of it.
_MUCH = 0.1


def text(summary):
    """The table of an `account`, and what it says."""
    if summary is None:
        return NOTHING
    rows = [("rank", "a step", "computes", "waits", "host", "waits", "host")]
    for r in summary["ranks"]:
        times = (r["step_ms"], r["compute_ms"], r["wait_ms"], r["host_ms"])
        rows.append(
            (str(r["rank"]), *(f"{ms:.2f} ms" for ms in times), f"{r['wait_share']:.0%}", f"{r['host_share']:.0%}")
        )
    lines = [f"steps {summary['steps']}, {summary['ranks'][0]['steps']} of them; times of {summary['measured']}", ""]
    lines += _aligned(rows)
    lines += ["", f"imbalance: the rank that computes most computes {summary['imbalance']:.0%} more than the mean"]
    if summary["largest_waits"]:
        lines += ["", "largest waits, ms of a step"]
        waits = [("rank", "for rank", "ms", "slot")]
        waits += [(str(w["rank"]), w["peers"], f"{w['wait_ms']:.2f}", w["slot"]) for w in summary["largest_waits"]]
        lines += _aligned(waits, left=3)
    return "\n".join([*lines, *("\n" + said for said in _said(summary))])


def _said(summary):
    """What to do about it."""
    ranks = summary["ranks"]
    waiting = [r["rank"] for r in ranks if r["wait_share"] > _MUCH]
    if waiting and len(waiting) == len(ranks) > 1:
        yield "All ranks wait: for the link between them. Let less travel (see plan), or share steps: parallel_steps."
    elif waiting:
        numbers = ", ".join(map(str, waiting))
        yield (
            f"{f'Ranks {numbers} wait' if len(waiting) > 1 else f'Rank {numbers} waits'}, others do not: the work is "
            'divided unevenly. Try balance="time" for stages, other sizes for patches.'
        )
    if max(r["host_share"] for r in ranks) > 2 * _MUCH:
        yield (
            "The host is slow: between operators nothing is computed. Draw larger pictures or batches; on a GPU, calls "
            "are captured where neither stages nor patches share them, and with graphs=True where either does."
        )


def _aligned(rows, left=0):
    """Lines; columns to the right, but for one from `left` on, if that is not 0."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            x.ljust(w) if left and i >= left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
