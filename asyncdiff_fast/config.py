"""The options of `patch`, checked when built."""

import dataclasses
from dataclasses import dataclass

from . import combinations
from .mesh import Mesh

# Exact steps at the beginning where the options do not say.
WARMUP_STEPS, STEPS_WARMUP = 4, 2
# Relative errors of predictions that are accepted where the options do not say.
ACTIVATION_TOLERANCE, LATENT_TOLERANCE = 0.05, 0.014

# What options that are words may be.
CHOICES = {
    "exchange": ("displaced", "sync", "none"),
    "group_norm": ("corrected", "stale", "sync", "local"),
    "patch_axis": ("rows", "columns", "alternating"),
    "stride_phase": ("warmup", "odd"),
    "balance": ("flops", "time", "memory"),
    "kernels": ("auto", "triton", "torch"),
    "predict": ("auto", "linear", "none"),
    "pipeline_text": ("unit", "stage", "patch"),
}


@dataclass(frozen=True)
class Config:
    """Options of `patch`.

    Args:
        num_stages: how many ranks share one call of the denoiser (AsyncDiff's N).
        stride: 1 computes at every step; 2 computes at every other step and uses one rank more.
        warmup_steps: first steps of each generation, exact; at least 1; default 4, with `parallel_steps` 2. "auto" ends
            them when predictions of what they made would have been within `tolerance`.
        time_shift: asynchronous steps use the timestep of the step before.
        stages: module names of each stage, instead of the search; modules not named run on every rank.
        stride_phase: with stride 2, "warmup" computes at the first step after warm-up and every other one from there;
            "odd" computes at odd steps, as the published implementation does.
        parallel_steps: how many ranks evaluate successive steps side by side, at predicted latents.
        num_patches: how many ranks share the rows of the picture (DistriFusion's patches).
        cfg_parallel: the two halves of classifier-free guidance run on different ranks.
        exchange: after warm-up, patches read of each other what the step before made ("displaced"), what this step
            makes ("sync"), or what the last exact step made ("none"; with warmup_steps=0 nothing: naive patches).
        group_norm: whose statistics a patch normalises with at displaced steps: the others' of the step before,
            corrected by the change of its own ("corrected") or not ("stale"), everybody's of this step ("sync"), or its
            own ("local").
        bessel: GroupNorm divides the variance by n - 1, as the published implementation does.
        patch_axis: naive patches are cut into "rows", "columns", or both by turns ("alternating").
        cut: {name of an input: its dimensions that run with the picture's rows or tokens, () for none}, where patches
            cut an input wrongly; the plan tells how.
        balance: "flops" divides by counted work, the same on all GPUs and on all CPUs; "time" measures each unit once;
            "memory" divides the bytes of weights, with `shard_weights`.
        timeout_s: seconds to wait for another rank before failing.
        kernels: "auto" replaces layers by fused kernels where they were measured to be faster, on a GPU with Triton;
            "triton" wherever they can run; "torch" nowhere.
        graphs: calls are captured as CUDA graphs and replayed, one for each kind of call, a UNet's convolutions with
            weights in channels_last; what cannot be captured is launched, and logged once. For one device, steps side
            by side, the halves of guidance, and stages, patches or patches through stages, whose stale calls are
            captured in pieces between their posts. "auto" does so on a GPU unless stages or patches share calls, a
            module is compiled, or comes from outside torch, diffusers, transformers, peft and torchao, and so might do
            something else at each call.
        predict: what another rank's values of the step before stand for: "linear" carries their last change forward by
            the sampler's intervals; "none" takes them as they are, as published; "auto" is "linear" where that was
            measured to be no worse in the mean and in the worst picture: for stages, and for two patches; not
            under `parallel_steps`.
        tolerance: the relative error of predictions that is accepted: warmup_steps="auto" ends by it, and blocks of
            parallel steps are as long as it allows. Default: 0.05 of activations, 0.014 of latents.
        resync: the next call is exact if the relative error of a prediction has come to more than this, and to several
            times what it was before, as after a change of the prompt; 0 for never. Patches of stages have neither.
        pipeline_patches: how many patches of the picture pass through the stages one after another (PipeFusion), or
            the rows of each; 1 keeps every call exact.
        pipeline_text: whose values without rows, such as a text stream, the patches after the first go on with: the
            first one's, behind every "unit" or as they come into a "stage"; or each "patch" has its own.
        run_ahead: stages that have nothing to do at the end of a call begin the next one, of whose first patches they
            foretell what the sampler makes; for denoisers that share keys and values only, and samplers that work
            element by element and draw nothing, once a call was foretold to the last bit.
        shard_weights: a rank holds the weights of its own stage and of the modules between stages only.
        vae: all ranks share the decoder of the pipeline's autoencoder too, as patches that are exact.
    Raises: ValueError that names the option, the value and the allowed values.
    Source: ParaStep (Wang et al., 2025); AsyncDiff (Chen et al., 2024), sections 3.2 to 3.4; DistriFusion (Li et al.,
        2024), section 4; PipeFusion (Fang et al., 2024), section 4.
    """

    num_stages: int = 1
    stride: int = 1
    warmup_steps: int | str | None = None
    time_shift: bool = False
    num_patches: int = 1
    parallel_steps: int = 1
    cfg_parallel: bool = False
    exchange: str = "displaced"
    group_norm: str = "corrected"
    bessel: bool = False
    patch_axis: str = "rows"
    stages: tuple[tuple[str, ...], ...] | None = None
    stride_phase: str = "warmup"
    cut: dict | None = None
    balance: str = "flops"
    timeout_s: float = 120.0
    kernels: str = "auto"
    graphs: bool | str = "auto"
    predict: str = "auto"
    tolerance: float | None = None
    resync: float = 0.2
    pipeline_patches: int | tuple[int, ...] | None = None
    pipeline_text: str = "unit"
    run_ahead: bool = False
    shard_weights: bool = False
    vae: bool = False

    def __post_init__(self):
        if self.stages is not None:
            self._set("stages", combinations.checked_stages(self.stages))
            if self.num_stages == 1:
                self._set("num_stages", len(self.stages))
        for name in ("num_stages", "num_patches", "parallel_steps"):
            self._check_integer(name, 1)
        if self.warmup_steps is None:
            self._set("warmup_steps", WARMUP_STEPS if self.parallel_steps == 1 else STEPS_WARMUP)
        if self.warmup_steps != "auto":
            self._check_integer("warmup_steps", 0)
        for name, allowed in CHOICES.items():
            quoted = [f'"{a}"' for a in allowed]
            self._check(getattr(self, name) in allowed, name, f"{', '.join(quoted[:-1])} or {quoted[-1]}")
        for name in ("cfg_parallel", "bessel", "time_shift", "run_ahead", "shard_weights", "vae"):
            self._check(isinstance(getattr(self, name), bool), name, "True or False")
        self._check(self.graphs == "auto" or isinstance(self.graphs, bool), "graphs", 'True, False or "auto"')
        self._check(type(self.stride) is int and self.stride in (1, 2), "stride", "1 or 2")
        self._check(_is_number(self.timeout_s) and self.timeout_s > 0, "timeout_s", "a positive number of seconds")
        for name in ("tolerance", "resync"):
            value = getattr(self, name)
            allowed = (name == "tolerance" and value is None) or (_is_number(value) and value >= 0)
            self._check(allowed, name, "a number of at least 0")
        self._check_pipeline_patches()
        combinations.check_pipeline(self)
        if self.predict == "auto":
            self._set("predict", "linear" if self._gains_by_predictions else "none")
        self._set("cut", combinations.checked_cut(self.cut))
        combinations.check_patches(self)
        if self.exchange == "sync":
            self._set("group_norm", "sync")
        combinations.check_all(self)
        if self.tolerance is None:
            self._set("tolerance", LATENT_TOLERANCE if self.parallel_steps > 1 else ACTIVATION_TOLERANCE)

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _check_pipeline_patches(self):
        given = self.pipeline_patches
        rows = (given,) if isinstance(given, int) else given
        whole = isinstance(rows, list | tuple) and rows and all(type(n) is int and n >= 1 for n in rows)
        allowed = "an integer of at least 1, or a list of the rows of each patch"
        self._check(given is None or whole, "pipeline_patches", allowed)
        if isinstance(given, list):
            self._set("pipeline_patches", tuple(given))

    @property
    def _gains_by_predictions(self):
        """Ways to share a call whose pictures predictions bring closer, the worst ones too (docs/prediction.md)."""
        if self.pipelined or self.parallel_steps > 1:
            return False
        return (self.num_stages > 1) != (self.num_patches == 2) and self.num_patches <= 2

    @property
    def checks(self):
        """True if ranks tell each other how far predictions were from what came."""
        shared = self.predicts_patches if self.num_patches > 1 else self.num_stages > 1 and self.predict != "none"
        return shared and 1 in (self.num_stages, self.num_patches) and not self.pipelined

    @property
    def least_warmup(self):
        """Exact steps at the beginning, at least."""
        return 1 if self.warmup_steps == "auto" else self.warmup_steps

    @property
    def reads_stale(self):
        """True if calls after warm-up read what calls before them have made."""
        stages = self.num_stages > 1 and (not self.pipelined or self.pipeline_count > 1)
        return stages or (self.num_patches > 1 and self.exchange != "sync")

    @property
    def pipelined(self):
        """True if patches pass through the stages one after another."""
        return self.pipeline_patches is not None

    @property
    def pipeline_count(self):
        """How many patches pass through the stages."""
        return len(self.pipeline_patches) if isinstance(self.pipeline_patches, tuple) else self.pipeline_patches or 1

    @property
    def naive(self):
        """True if patches know nothing of each other."""
        return self.num_patches > 1 and self.exchange == "none" and self.warmup_steps == 0

    def _check(self, ok, name, allowed):
        if not ok:
            raise ValueError(f"{name} must be {allowed}: got {name}={getattr(self, name)!r}")

    def _check_integer(self, name, least):
        value = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self._check(ok, name, f"an integer of at least {least}")

    @property
    def predicts_patches(self):
        """True if patches carry on the trend of what they read of each other."""
        return self.num_patches > 1 and self.exchange == "displaced" and self.predict != "none"

    @property
    def ways(self):
        """The options that say how calls are shared, as text; empty on one device."""
        names = ("parallel_steps", "cfg_parallel", "num_patches", "num_stages", "stride", "pipeline_patches")
        given = {name: getattr(self, name) for name in names}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value not in (1, False, None))

    @property
    def inside(self):
        """True if something inside the denoiser is shared out."""
        return self.num_stages > 1 or self.num_patches > 1

    @property
    def stage_ranks(self):
        """Ranks that share the stages: one for each, and one more with stride 2."""
        return self.num_stages + self.stride - 1

    @property
    def mesh(self):
        """The ranks as a `Mesh` of steps side by side, CFG halves, patches and stages."""
        return Mesh(self.parallel_steps, 2 if self.cfg_parallel else 1, self.num_patches, self.stage_ranks)

    @property
    def world_size(self):
        """Ranks needed."""
        return self.mesh.size

    @classmethod
    def from_options(cls, options):
        """Config from keyword options. Raises TypeError that lists the known ones if a name is unknown."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; known options: {', '.join(known)}")
        return cls(**options)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and value < 1e9
