"""The published stages of AsyncDiff, as `stages=` takes them."""

# The published stages (AsyncDiff, pipe_config.py), by model and number of stages, in the short names of `_long`.
STAGES = {
    ("sdxl", 2): "d2 m u0.r0 u0.a0 u0.r1 u0.a1 | in d0 d1 u1 u2 out u0.r2 u0.a2 u0.up",
    ("sdxl", 3): "d2 m u0.r0 | u0.a0 u0.r1 u0.a1 u0.r2 u0.a2 u0.up | in d0 d1 u1 u2 out",
    ("sdxl", 4): "d1.a0 d1.r1 d1.a1 d1.ds d2 | m u0.r0 u0.a0 | u0.r1 u0.a1 u0.r2 u0.a2 u0.up | in d0 d1.r0 u1 u2 out",
    ("sd21", 2): "in d0 d1 d2 d3 m u0 u1.r0 u1.a0 u1.r1 u1.a1 u1.r2 | u1.a2 u1.up u2 u3 out",
    ("sd21", 3): "in d0 d1 d2 d3 | m u0 u1 u2 | u3 out",
    ("sd21", 4): "in d0 d1 | d2 d3 m u0 u1 | u2 u3.r0 | u3.a0 u3.r1 u3.a1 u3.r2 u3.a2 out",
    ("sd15", 2): "in d0 d1 d2 d3 m u0 u1.r0 u1.a0 u1.r1 | u1.a1 u1.r2 u1.a2 u1.up u2 u3 out",
    ("sd15", 3): "in d0 d1 d2 d3 | m u0 u1 u2.r0 u2.a0 u2.r1 u2.a1 u2.r2 | u2.a2 u2.up u3 out",
    ("sd15", 4): "in d0 d1 | d2 d3 m u0 u1.r0 u1.a0 u1.r1 | u1.a1 u1.r2 u1.a2 u1.up u2 | u3 out",
    ("svd", 2): "in d0 d1 d2 d3 m u0 u1 | u2 u3 out",
    ("svd", 3): "in d0 d1 d2 | d3 m u0 u1 u2 | u3 out",
    ("svd", 4): "d1.r0 d1.a0 in d0 | d1.r1 d1.a1 d1.ds d2 d3 m u0 u1 | u2 u3.r0 u3.a0 | u3.r1 u3.a1 u3.r2 u3.a2 out",
    ("animatediff", 2): "in d0 d1 d2 d3 m u0 u1 | u2 u3 out",
    ("animatediff", 3): "in d0 d1 d2 d3 | m u0 u1 u2 | u3 out",
    ("upscaler", 3): "in d0 d1 d2 d3 | m u0 u1 u2.a0 u2.r0 u2.a1 | u2.r1 u2.a2 u2.r2 u2.up u3 out",
}
_PARTS = {"r": "resnets", "a": "attentions", "up": "upsamplers.0", "ds": "downsamplers.0"}


def _long(short, motion):
    """Module names of one short name; a motion model's resnets and attentions have motion modules beside them."""
    if short == "in":
        return ["conv_in"]
    if short == "out":
        return ["conv_norm_out", "conv_out"]
    if short == "m":
        return ["mid_block"]
    block, _, part = short.partition(".")
    name = f"{'down' if block[0] == 'd' else 'up'}_blocks.{block[1:]}"
    if not part:
        return [name]
    return [f"{name}.{_PARTS[part]}" if part in _PARTS else f"{name}.{_PARTS[part[0]]}.{part[1:]}"]


def published_stages(model, num_stages):
    """The published division of a model, as `stages=` takes it."""
    if model == "sd3":
        share = 24 // num_stages
        stages = [[f"transformer_blocks.{i}" for i in range(s * share, (s + 1) * share)] for s in range(num_stages)]
        stages[-1] += ["norm_out", "proj_out"]
        return stages
    parts = STAGES[model, num_stages].split("|")
    return [[name for short in part.split() for name in _long(short, model)] for part in parts]
