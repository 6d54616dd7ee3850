"""Which options of `patch` go together: each rule as one error that names it, the values and the way out."""

# What else an option may be where patches pass through the stages.
_WITH_PIPELINE = {
    "num_patches": (1,),
    "stride": (1,),
    "time_shift": (False,),
    "exchange": ("displaced",),
    "group_norm": ("corrected", "stale", "local"),
    "patch_axis": ("rows",),
}
# And where stages begin the next call.
_RUN_AHEAD = {"cfg_parallel": (False,), "predict": ("auto", "none"), "parallel_steps": (1,)}
# Options that say how patches or stages go about it, each with what it is of: alone they change nothing.
_DETAILS = {
    "group_norm": ("num_patches", lambda config: config.num_patches > 1),
    "bessel": ("num_patches", lambda config: config.num_patches > 1),
    "cut": ("num_patches or pipeline_patches", lambda config: config.num_patches > 1 or config.pipeline_count > 1),
    "pipeline_text": ("pipeline_patches", lambda config: config.pipeline_count > 1),
    "time_shift": ("num_stages", lambda config: config.num_stages > 1),
    "stride_phase": ("stride=2", lambda config: config.stride == 2),
}
# And beneath steps side by side, where calls read what calls of several steps ago have made.
_UNDER_STEPS = {
    "exchange": ("displaced", "sync"),
    "stride": (1,),
    "time_shift": (False,),
    "predict": ("none",),
}


def check_pipeline(config):
    """Patches that pass through the stages: what does not go with them. Raises: ValueError."""
    given = config.pipeline_patches
    if config.balance == "memory" and not config.shard_weights:
        raise ValueError(
            'balance="memory" divides by bytes of weights, and every rank holds all of them: got '
            f'balance="memory", shard_weights={config.shard_weights}; pass shard_weights=True, or balance="flops"'
        )
    if given is None and config.shard_weights:
        raise ValueError(
            "shard_weights needs patches that pass through the stages, whose exact steps do so too: got "
            f"shard_weights=True, num_stages={config.num_stages}, pipeline_patches=None; pass pipeline_patches as "
            "well (1 keeps every call exact)"
        )
    if config.run_ahead and config.pipeline_count < max(2, config.num_stages):
        raise ValueError(
            "run_ahead needs at least as many patches as stages, so that the first are over before the last begin: got "
            f"run_ahead=True, pipeline_patches={given}, num_stages={config.num_stages}; pass "
            f"pipeline_patches={max(2, config.num_stages)} or more, or run_ahead=False"
        )
    if given is None:
        return
    if config.num_stages < 2:
        raise ValueError(
            f"pipeline_patches need stages to pass through: got pipeline_patches={config.pipeline_patches}, "
            f"num_stages={config.num_stages}; pass num_stages of at least 2, or num_patches for patches side by side"
        )
    if config.run_ahead:
        _check_beside(config, "run_ahead goes", "run_ahead=True", _RUN_AHEAD, "pass run_ahead=False")
    _check_beside(config, "pipeline_patches go", f"pipeline_patches={given}", _WITH_PIPELINE, "pass num_stages alone")


def _check_beside(config, goes, given, allowed, way_out):
    """Raises: ValueError if an option is none of those `allowed` beside what is `given`."""
    for name, only in allowed.items():
        if getattr(config, name) not in only:
            raise ValueError(
                f"{goes} with {name}={' or '.join(repr(x) for x in only)} only: got {given}, "
                f"{name}={getattr(config, name)!r}; {way_out}, or leave {name} out"
            )


def check_patches(config):
    """Patches side by side. Raises: ValueError."""
    if config.warmup_steps == 0 and not config.naive:
        raise ValueError(
            "warmup_steps must be an integer of at least 1: got warmup_steps=0; only naive patches (num_patches of "
            'at least 2, exchange="none") work without an exact step'
        )
    if config.patch_axis != "rows" and not config.naive:
        raise ValueError(
            f'patch_axis must be "rows" unless patches are naive: got patch_axis={config.patch_axis!r}; pass '
            'exchange="none", warmup_steps=0'
        )
    if config.num_patches > 1 and config.exchange == "sync" and config.group_norm in ("stale", "local"):
        raise ValueError(
            'exchange="sync" is exact, so patches normalise with the statistics of the whole picture: got '
            f'exchange="sync", group_norm={config.group_norm!r}; leave one of them out'
        )
    if config.num_patches == 1 and config.exchange != "displaced" and (config.reads_stale or config.parallel_steps > 1):
        raise ValueError(
            "exchange says how patches read of each other, and makes neither stages nor steps side by side exact: got "
            f"exchange={config.exchange!r}, num_patches=1, num_stages={config.num_stages}, "
            f"parallel_steps={config.parallel_steps}; pass num_patches instead of these, or leave exchange out"
        )


def idle(config):
    """{name of an option that was given and changes nothing: the options that it is of}."""
    if config.world_size == 1:
        return {}
    defaults = type(config)()
    given = {name: of for name, of in _DETAILS.items() if getattr(config, name) != getattr(defaults, name)}
    return {name: of for name, (of, is_used) in given.items() if not is_used(config)}


def check_all(config):
    """All that is left, once every option has its value. Raises: ValueError."""
    _check_stages(config)
    _check_steps(config)
    _check_predictions(config)
    _check_graphs(config)


def _check_stages(config):
    if config.stages is not None and len(config.stages) != config.num_stages:
        raise ValueError(
            f"stages must have num_stages lists: got {len(config.stages)} lists, num_stages={config.num_stages}; "
            "leave num_stages out or make them equal"
        )
    if config.stride == 2 and config.num_stages < 2:
        raise ValueError(
            f"stride=2 needs num_stages of at least 2: got num_stages={config.num_stages}; pass num_stages=2 "
            "(3 processes) or stride=1"
        )
    if config.num_patches > 1 and config.num_stages > 1 and config.group_norm == "sync":
        raise ValueError(
            f"patches of stages cannot wait for each other: got num_stages={config.num_stages}, "
            f'num_patches={config.num_patches}, exchange={config.exchange!r}, group_norm="sync"; pass '
            'exchange="displaced" with group_norm "corrected", "stale" or "local", or num_stages=1'
        )


def _check_steps(config):
    if config.parallel_steps > 1 and config.reads_stale:
        goes = "stages and patches whose inputs are several steps old, beneath steps side by side, go"
        given = f"parallel_steps={config.parallel_steps}"
        _check_beside(config, goes, given, _UNDER_STEPS, "pass parallel_steps=1")


def _check_predictions(config):
    if config.warmup_steps == "auto" and not config.checks and config.parallel_steps == 1:
        raise ValueError(
            f'warmup_steps="auto" needs predictions to judge by: got num_stages={config.num_stages}, '
            f"num_patches={config.num_patches}, exchange={config.exchange!r}, predict={config.predict!r}; pass a "
            'number, or predict="linear" with either stages or displaced patches, or parallel_steps'
        )


def _check_graphs(config):
    if config.graphs is not True:
        return
    if config.num_patches > 1 and config.num_stages > 1:
        raise ValueError(
            "calls of patches that stages share are not captured, those of either alone are, and those of patches that "
            f"pass through stages: got graphs=True, num_stages={config.num_stages}, num_patches={config.num_patches}; "
            "pass graphs=False, num_stages or num_patches alone, or pipeline_patches in place of num_patches"
        )
    if config.pipelined and config.pipeline_count == 1:
        raise ValueError(
            "of patches that pass through stages those of two and more are captured: got graphs=True, "
            f"pipeline_patches={config.pipeline_patches}; pass graphs=False, or more patches"
        )
    if config.num_patches > 1 and config.exchange != "displaced":
        raise ValueError(
            "of patches only displaced calls are captured: got graphs=True, "
            f"num_patches={config.num_patches}, exchange={config.exchange!r}; pass graphs=False, or "
            'exchange="displaced"'
        )


def checked_cut(cut):
    """What inputs are cut by as ((name, dimensions), ...)."""
    pairs = cut.items() if isinstance(cut, dict) else cut or ()
    pairs = tuple((name, (dims,) if isinstance(dims, int) else tuple(dims or ())) for name, dims in pairs)
    if not all(isinstance(n, str) and all(isinstance(d, int) for d in dims) for n, dims in pairs):
        raise ValueError(
            f"cut must be a dict of names of inputs and their dimensions, such as {{'mask': 1}}: got {cut!r}"
        )
    return pairs


def checked_stages(stages):
    """Stages as tuples of names, each name once and none inside another."""
    if (
        not isinstance(stages, list | tuple)
        or not stages
        or not all(isinstance(names, list | tuple) for names in stages)
    ):
        raise ValueError(f"stages must be a list of lists of module names: got {stages!r}")
    stages = tuple(tuple(names) for names in stages)
    seen = {}
    for s, names in enumerate(stages):
        if not names:
            raise ValueError(
                f"every stage must name at least one module: stage {s} is empty; remove it or name its modules"
            )
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"stages must be a list of lists of module names: got {name!r} in stage {s}")
            if name in seen:
                raise ValueError(
                    f"a module belongs to one stage: {name!r} is listed in stages {seen[name]} and {s}; keep one"
                )
            seen[name] = s
    for name in seen:
        parts = name.split(".")
        for outer in (".".join(parts[:i]) for i in range(1, len(parts))):
            if outer in seen:
                raise ValueError(
                    f"a stage's modules must not contain each other: {name!r} (stage {seen[name]}) lies "
                    f"inside {outer!r} (stage {seen[outer]}); list one of them"
                )
    return stages
