"""`load`: a pipeline whose denoiser never lies as a whole in any process."""

import contextlib
import importlib
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights

from .exchange.world import device as device_of_rank
from .patching import patch_unless
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
        torch_dtype, variant: as `from_pretrained` takes them.
        device: default: `device()`.
        components: dict of components that are there already, such as a text encoder or None for one.
        mesh, options: as `patch` takes them; `shard_weights=True`, and pipeline_patches=1 unless it says otherwise.
    Returns: the pipeline.
    Raises: ValueError or TypeError on every rank alike if one cannot read the folder so; what `patch` raises.
    """
    options, pipe, problem = {"pipeline_patches": 1, "shard_weights": True} | options, None, None
    try:
        _check(pipeline_class, torch_dtype, components, options)
        where = torch.device(device or device_of_rank())
        pipe = _loaded(pipeline_class, Path(path), torch_dtype, variant, where, components)
    except Exception as error:
        # Refused below, where the other ranks learn of it.
        problem = error
    patch_unless(problem, pipe, mesh, None, options)
    return pipe


def _check(pipeline_class, dtype, components, options):
    if not hasattr(pipeline_class, "from_pretrained"):
        raise TypeError(f"load needs a pipeline class, such as diffusers.FluxPipeline: got {pipeline_class!r:.80}")
    for one in dtype.values() if isinstance(dtype, dict) else [dtype]:
        if not isinstance(one, torch.dtype | None):
            raise TypeError(f"torch_dtype must be a torch.dtype, or a dict of them by component: got {one!r:.80}")
    if not isinstance(components, dict | None):
        raise TypeError(f"components must be a dict by name: got {type(components).__name__}")
    if options["shard_weights"] is not True:
        raise ValueError(
            f"load reads to each rank the weights of its stage alone: got shard_weights={options['shard_weights']}; "
            "leave it out, or use from_pretrained and patch"
        )


def _loaded(pipeline_class, path, dtype, variant, device, components):
    """The pipeline, its denoisers without weights."""
    index, given = _index(path), dict(components or {})
    with heap.mapped():
        for name, entry in index.items():
            if name.startswith(("unet", "transformer")) and name not in given and isinstance(entry, list) and entry[0]:
                own = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
                given[name] = _without_weights(path / name, _class(path, name, entry), own, variant, device)
    pipe = pipeline_class.from_pretrained(path, torch_dtype=dtype, variant=variant, **given)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module) and not hasattr(component, CHECKPOINT):
            getattr(pipe, name).to(device)
    return pipe


def _index(path):
    """What model_index.json says: {name: [library, class]}."""
    file = path / "model_index.json"
    if not file.is_file():
        raise ValueError(f"load needs a folder with model_index.json: got {path}; save_pretrained a pipeline there")
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): save the pipeline anew") from None
    if not isinstance(index, dict):
        raise ValueError(f"{file} must be a dict of components: got a {type(index).__name__}; save the pipeline anew")
    return index


def _class(path, name, entry):
    """The class of a component."""
    try:
        return getattr(importlib.import_module(entry[0]), entry[1])
    except (ImportError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path / 'model_index.json'} says that {name} is {entry}, which cannot be imported ({error}): install it, "
            f"or pass components={{{name!r}: …}}"
        ) from None


def _without_weights(folder, cls, dtype, variant, device):
    """A denoiser of a folder's config, a stand-in for each weight; its buffers are there."""
    config = cls.load_config(folder)
    if config.get("quantization_config"):
        raise ValueError(
            f"shard_weights needs weights that are plain tensors: {folder} holds quantised ones; use from_pretrained, "
            "and patch with shard_weights=False"
        )
    checkpoint, dtype = Checkpoint(folder, variant), dtype or torch.float32
    with init_empty_weights(include_buffers=False), _default(dtype):
        model = cls.from_config(config)
    exact = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())

    def dtype_of(name):
        if not checkpoint.dtype(name).is_floating_point:
            return checkpoint.dtype(name)
        return torch.float32 if any(part in name.split(".") for part in exact) else dtype

    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if checkpoint.shape(full) != p.shape:
                raise ValueError(
                    f"{full} must be {tuple(p.shape)}, as the config says: got {tuple(checkpoint.shape(full))} in "
                    f"{folder}; it holds another model"
                )
            value = stand_in(p.shape, dtype_of(full), device)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if full in checkpoint:
                buffer = checkpoint.read(full).to(dtype_of(full))
            setattr(module, name, buffer.to(device))
    setattr(model, CHECKPOINT, checkpoint)
    return model.eval()


@contextlib.contextmanager
def _default(dtype):
    """Within it a type is torch's default, as where `from_pretrained` makes a model: buffers are of it."""
    before = torch.get_default_dtype()
    if dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
