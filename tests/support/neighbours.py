"""What people put on a pipeline, before it is patched or after: the rows of docs/compatibility.md."""

import copy
import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import diffusers
import guided
import tiny_denoisers
import tiny_pipelines
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_parts import fill

CPU = torch.device("cpu")
TARGETS = ["to_q", "to_v", "conv_in"]


def nothing(pipe):
    """Leave it as it is."""


@dataclass(frozen=True)
class Row:
    """`before(pipe)` comes before `patch`, `after(pipe)` after a first picture."""

    text: str
    before: Callable = nothing
    after: Callable = nothing
    name: str = "sd15"
    arguments: Callable = dict
    tolerance: float = 1e-3

    def build(self):
        return CUSTOM[self.name]() if self.name in CUSTOM else tiny_pipelines.build(self.name)

    def draw(self, pipe):
        if self.name == "guiders":
            return guided.sample(pipe.transformer, guided.skip_layers()).numpy()
        kind = "sd15" if self.name in CUSTOM else self.name
        return tiny_pipelines.generate(pipe, kind, steps=3, **self.arguments())


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


class _Alone:
    """A denoiser without a pipeline's loop."""

    def __init__(self):
        self.transformer = tiny_denoisers.wan_transformer()
        self.components = {"transformer": self.transformer}


def _t2i_adapter():
    adapter = fill(diffusers.T2IAdapter(channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=2))
    parts = dict(tiny_pipelines._sd_parts(), unet=tiny_denoisers.sd15_unet(), adapter=adapter)
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return diffusers.StableDiffusionAdapterPipeline(**parts, **none)


CUSTOM = {"t2i": _t2i_adapter, "guiders": _Alone}


def add_lora(pipe, name="default", seed=7):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    denoiser(pipe).add_adapter(config, name)


def _two_loras(pipe):
    add_lora(pipe, "a", 7)
    add_lora(pipe, "b", 8)
    pipe.unet.set_adapters("a")


def _lora_of_file(pipe, seed=7, **options):
    other = tiny_denoisers.sd15_unet()
    torch.manual_seed(seed)
    other.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(other, adapter_name="default")
    pipe.unet.load_lora_adapter(state, prefix=None, adapter_name="default", **options)


def add_ip_adapter(pipe):
    unet, draw = pipe.unet, torch.Generator().manual_seed(5)
    order = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    sizes = {n: unet.get_submodule(n.removesuffix(".processor")).to_k.weight.shape for n in order}
    names = {f"{2 * i + 1}.to_{x}_ip.weight": sizes[n] for i, n in enumerate(order) for x in "kv"}
    width = unet.config.cross_attention_dim
    image = {"proj.weight": torch.randn(4 * width, width, generator=draw), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    weights = {name: 0.3 * torch.randn(size, generator=draw) for name, size in names.items()}
    unet._load_ip_adapter_weights([{"ip_adapter": weights, "image_proj": image}])
    pipe.set_ip_adapter_scale(0.6)


def _offload_model(pipe):
    accelerate.cpu_offload_with_hook(denoiser(pipe), CPU)


def _offload_layers(pipe):
    accelerate.cpu_offload(denoiser(pipe), execution_device=CPU)


def _offload_groups(pipe):
    denoiser(pipe).enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def _cast_layers(pipe):
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def _compile_blocks(pipe):
    denoiser(pipe).compile_repeated_blocks(backend="eager")


def _compile(pipe):
    denoiser(pipe).compile(backend="eager")


def _step_cache(pipe):
    denoiser(pipe).enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.01))


def _saved(pipe):
    with tempfile.TemporaryDirectory() as folder:
        pipe.unet.save_pretrained(folder)
        loaded = diffusers.UNet2DConditionModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in pipe.unet.state_dict().items())


def _signature(pipe):
    own = inspect.signature(type(pipe.unet).forward).parameters
    assert list(inspect.signature(pipe.unet.forward).parameters) == list(own)[1:]


def _image():
    return dict(image=tiny_pipelines._picture(32))


def _embeds():
    return dict(ip_adapter_image_embeds=[torch.ones(2, 1, 32)])


def _masked():
    """One picture where the mask says so: the upper left."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :20, :12] = 1
    return _embeds() | dict(cross_attention_kwargs={"ip_adapter_masks": [mask]})


def _both(text, change, **options):
    return [Row(f"{text}, before", before=change, **options), Row(f"{text}, after", after=change, **options)]


ADAPTERS = [
    *_both("LoRA added", add_lora),
    Row("LoRA scaled after", add_lora, lambda pipe: pipe.unet.set_adapters(["default"], [0.3])),
    Row("LoRA switched after", _two_loras, lambda pipe: pipe.unet.set_adapters("b")),
    Row("LoRA deleted after", add_lora, lambda pipe: pipe.unet.delete_adapters("default")),
    Row("LoRA hotswapped after", _lora_of_file, functools.partial(_lora_of_file, seed=8, hotswap=True)),
    Row("LoRA fused before", lambda pipe: (add_lora(pipe), pipe.unet.fuse_lora())),
    Row("LoRA fused after", add_lora, lambda pipe: pipe.unet.fuse_lora()),
    Row("ControlNet", name="sdxl_controlnet"),
    Row("T2I-Adapter", name="t2i", arguments=_image),
    Row("IP-Adapter before", add_ip_adapter, arguments=_embeds),
    Row("IP-Adapter scaled after", add_ip_adapter, lambda p: p.set_ip_adapter_scale(0.2), arguments=_embeds),
    Row("IP-Adapter with masks", add_ip_adapter, arguments=_masked),
]
LAYERS = [
    *_both("fused projections", lambda pipe: pipe.unet.fuse_qkv_projections()),
    *_both("`set_attention_backend`", lambda p: p.transformer.set_attention_backend("_native_math"), name="wan"),
    *_both("offloaded as a whole", _offload_model),
    *_both("offloaded by layer", _offload_layers),
    *_both("offloaded in groups", _offload_groups),
    *_both("layerwise casting", _cast_layers, tolerance=0.05),
]
WHOLE = [
    *_both("`compile_repeated_blocks`", _compile_blocks, name="wan"),
    *_both("`compile`", _compile, name="wan"),
    *_both("a step cache", _step_cache, name="wan"),
    Row("guiders of modular pipelines", name="guiders"),
    Row("`copy.deepcopy` after", after=lambda pipe: copy.deepcopy(pipe)),
    Row("`save_pretrained` after", after=_saved),
    Row("`pipe.to(dtype)` after", after=lambda pipe: pipe.to(torch.float64)),
    Row("`inspect.signature(denoiser.forward)` after", after=_signature),
]
GROUPS = {"adapters": ADAPTERS, "layers": LAYERS, "whole": WHOLE}
