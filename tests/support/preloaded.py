"""What the server of `ranks` has loaded before it forks: all that most ranks would load, one by one."""

import gc
import importlib
import os
import pkgutil

import asyncdiff_fast

# What test files load, and diffusers and transformers at the first use.
LAZY = (
    "pytest",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "torch.utils.flop_counter",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.t5.modeling_t5",
)
SUPPORT = ("bare", "oracle", "steps_oracle", "tiny_pipelines", "workers")
# These change something where they are loaded, or are programs.
LEFT_OUT = ("asyncdiff_fast.auto", "asyncdiff_fast.commands", "asyncdiff_fast.kernels")


def _own():
    found = pkgutil.walk_packages(asyncdiff_fast.__path__, "asyncdiff_fast.")
    return [module.name for module in found if not module.name.startswith(LEFT_OUT)]


for name in (*_own(), *LAZY, *SUPPORT):
    importlib.import_module(name)
# Nothing of it is ever garbage: ranks need not look through it.
gc.freeze()
# It was for this file alone.
del os.environ["PYTHONPATH"]
