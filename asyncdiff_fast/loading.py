"""`load`: a pipeline whose denoiser never lies as a whole in any process."""

import importlib
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights

from .exchange.world import device as device_of_rank
from .patching import patch
from .pipelined import heap
from .pipelined.checkpoint import Checkpoint
from .pipelined.shards import CHECKPOINT, stand_in


def load(pipeline_class, path, *, torch_dtype=None, variant=None, device=None, components=None, mesh=None, **options):
    """A patched pipeline from a folder, every rank holding its own stage's weights only. Collective.

    A function and not a context around `from_pretrained`, because a denoiser's weights are read only at the first call:
    its inputs say which stage needs which. Until then the denoiser has one number in place of each weight. All other
    components are loaded whole on every rank, as `from_pretrained` does.

    Args:
        pipeline_class: a diffusers pipeline, `StableDiffusion3Pipeline` say.
        path: a folder of `save_pretrained`, with safetensors files.
        torch_dtype: of all weights; default: as saved.
        variant: as `from_pretrained` takes it.
        device: default: `device()`.
        components: dict of components that are there already, such as a text encoder or None for one.
        mesh, options: as `patch` takes them; `shard_weights=True`, and pipeline_patches=1 unless it says otherwise.
    Returns: the pipeline.
    Raises: ValueError if the folder cannot be read so; what `patch` raises.
    """
    path, device = Path(path), torch.device(device or device_of_rank())
    if not (path / "model_index.json").is_file():
        raise ValueError(f"load needs a folder with model_index.json: got {path}; save_pretrained a pipeline there")
    index = json.loads((path / "model_index.json").read_text())
    given = dict(components or {})
    with heap.mapped():
        for name, entry in index.items():
            if name.startswith(("unet", "transformer")) and name not in given and isinstance(entry, list) and entry[0]:
                given[name] = _without_weights(path / name, *entry, torch_dtype, variant, device)
    pipe = pipeline_class.from_pretrained(path, torch_dtype=torch_dtype, variant=variant, **given)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module) and not hasattr(component, CHECKPOINT):
            getattr(pipe, name).to(device)
    patch(pipe, mesh=mesh, **{"pipeline_patches": 1, "shard_weights": True} | options)
    return pipe


def _without_weights(folder, library, kind, dtype, variant, device):
    """A denoiser of a folder's config, a stand-in for each weight; its buffers are there."""
    cls, checkpoint = getattr(importlib.import_module(library), kind), Checkpoint(folder, variant)
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(cls.load_config(folder))
    exact = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())

    def dtype_of(name):
        if dtype is None or not checkpoint.dtype(name).is_floating_point:
            return checkpoint.dtype(name)
        return torch.float32 if any(part in name.split(".") for part in exact) else dtype

    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            value = stand_in(p.shape, dtype_of(full), device)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            value = checkpoint.read(full) if full in checkpoint else buffer
            floating = value.is_floating_point() and dtype is not None
            setattr(module, name, value.to(device, dtype if floating else None))
    setattr(model, CHECKPOINT, checkpoint)
    return model.eval()
