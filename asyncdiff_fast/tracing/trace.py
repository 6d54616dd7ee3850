"""One traced forward: records every module call and tensor operation of a denoiser as plain numbers."""

import math

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ..calls.signature import CallSignature
from ..versions import version
from . import side_effects
from .recording import Enter, Exit, Op, Recording, TensorRef

_aten = torch.ops.aten
# These read the shape of a tensor but never its data.
_SHAPE_ONLY = {
    _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like,
    _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty_strided,
}  # fmt: skip
# What they give may tell how many values go where, as in a mixture of experts.
_CHOICES = {_aten.bincount, _aten.topk, _aten.sort, _aten.argsort, _aten.argmax, _aten.histc}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _sdpa_flops(q, k, v, *_, **__):
    """FLOPs of q k^T and of its product with v; q (b, h, s, d), k and v (b, h, s_kv, d)."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


_OWN_FORMULAS = {_aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}


class _Recorder(TorchDispatchMode):
    """Dispatch mode and module hooks that fill a `Recording`. `chooses`: whether sizes may follow from values."""

    supports_higher_order_operators = True

    def __init__(self, denoiser):
        super().__init__()
        self.recording, self.chooses = Recording(), False
        self._numbers = {}
        self._weights = set(self.numbers(list(denoiser.parameters())))

    def _number(self, tensor):
        """Number of a tensor's storage; the weak reference keeps the number from being used again."""
        try:
            ref = StorageWeakRef(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError, AttributeError):
            # A wrapper subclass without storage, such as a quantised weight: never an activation.
            return None
        return self._numbers.setdefault(ref, len(self._numbers))

    def numbers(self, tree):
        """Storage numbers of all tensors in a tree, in order, without repeats."""
        found = (self._number(x) for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
        return tuple(dict.fromkeys(n for n in found if n is not None))

    def refs(self, tree):
        """(leaves, opaque): a `TensorRef` or None for each leaf; opaque if a leaf could hide tensors."""
        leaves, opaque = [], False
        for x in tree_leaves(tree):
            number = self._number(x) if isinstance(x, torch.Tensor) else None
            opaque |= number is None and not isinstance(x, _PLAIN)
            if number is None:
                leaves.append(None)
                continue
            dtype = str(x.dtype).removeprefix("torch.")
            nbytes, layout = x.numel() * x.element_size(), (x.storage_offset(), x.stride())
            whole = nbytes == x.untyped_storage().nbytes()
            leaves.append(TensorRef(number, tuple(x.shape), dtype, nbytes, layout, whole))
        return tuple(leaves), opaque

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            # Such as flex_attention: it makes new tensors of those it is given.
            result = func(*args, **kwargs)
            flops = _sdpa_flops(*args[:3]) if func.name() == "flex_attention" else 0
            self._note((args, kwargs), self.numbers(result), flops, False, result)
            return result
        packet = func._overloadpacket
        self.chooses |= torch.Tag.dynamic_output_shape in func.tags or packet in _CHOICES
        known = packet in flop_registry or packet in _OWN_FORMULAS
        if not known and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        flops = 0
        if packet in _OWN_FORMULAS:
            flops = _OWN_FORMULAS[packet](*args, **kwargs)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        reads = self.numbers((args, kwargs))
        # A result in the storage of an argument is an alias unless the operation is declared to write there.
        written = tuple(n for n in self.numbers(result) if n not in reads) + self._mutated(func, args, kwargs)
        branches = packet is _aten._local_scalar_dense
        if written or branches:
            self._note(() if packet in _SHAPE_ONLY else (args, kwargs), written, flops, branches, result)
        return result

    def _note(self, given, written, flops, branches, result):
        moved = self._moved((given, result)) if given else 0
        self.recording.events.append(Op(self.numbers(given), written, int(flops), branches, moved))

    def _moved(self, tree):
        """Bytes of the tensors in a tree that are not weights."""
        moved = (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and self._number(x) not in self._weights)
        return sum(x.numel() * x.element_size() for x in moved)

    def _mutated(self, func, args, kwargs):
        """Storages that an in-place operation or an `out=` argument writes."""
        if not func._schema.is_mutable:
            return ()
        named = zip(func._schema.arguments, args, strict=False)
        values = [v for a, v in named if a.alias_info is not None and a.alias_info.is_write]
        values += [
            kwargs[a.name]
            for a in func._schema.arguments
            if a.name in kwargs and a.alias_info is not None and a.alias_info.is_write
        ]
        return self.numbers(values)

    def hook(self, denoiser):
        """Register hooks on every submodule; returns their handles."""
        handles, entered = [], []
        for name, module in denoiser.named_modules():
            if not name:
                continue
            calls = [0]

            def enter(module, args, kwargs, name=name, calls=calls):
                self.recording.events.append(Enter(name, calls[0], *self.refs((args, kwargs))))
                calls[0] += 1
                entered.append(side_effects.belongings(module, (args, kwargs)))

            def leave(module, args, kwargs, output):
                leaves, opaque = self.refs(output)
                # A rank that replays a call does not repeat its side effects; and numbers may follow the timestep.
                opaque |= side_effects.differ(entered.pop(), side_effects.belongings(module, (args, kwargs)))
                opaque |= any(isinstance(x, float) for x in tree_leaves(output))
                self.recording.events.append(Exit(leaves, opaque))

            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, with_kwargs=True),
            ]
        return handles

    def note_state(self, before):
        """Find what is kept from call to call: attributes that were read in this one, and then changed.

        What an attention processor keeps is for whoever put it there, as of self-attention guidance: it need not be
        read.
        """
        read = {storage for event in self.recording.events if isinstance(event, Op) for storage in event.reads}
        for name, module, kept in before:
            after = side_effects.kept_by(module)
            if not side_effects.differ(kept, [(x, version(x)) for x in after]):
                continue
            is_module = isinstance(module, torch.nn.Module)
            if not is_module or read.intersection(self.numbers([x for x, _ in kept])):
                self.recording.state += ((name or type(module).__name__, self.numbers(after)),)


def record(denoiser, forward, args, kwargs):
    """Run one forward on copies of the inputs and record it; the result is discarded.

    Args:
        denoiser: the module whose submodules are watched.
        forward: what to call (the denoiser's own forward, without hooks of ours).
        args, kwargs: as the pipeline passes them. They are not changed.
    Returns: `Recording`.
    """
    recorder = _Recorder(denoiser)
    args, kwargs = tree_map_only(torch.Tensor, copied_whole, (args, kwargs))
    signature = CallSignature(denoiser)
    recorder.recording.latent = frozenset(recorder.numbers(signature.latent(args, kwargs)))
    recorder.recording.timestep = frozenset(recorder.numbers(signature.timestep(args, kwargs)))
    timestep = signature.timestep(args, kwargs)
    if type(timestep) in (int, float):
        watched = side_effects.watched(timestep, lambda: setattr(recorder.recording, "steered", True))
        args, kwargs = signature.with_timestep(args, kwargs, watched)
    with side_effects.restored(denoiser) as before:
        handles = recorder.hook(denoiser)
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), recorder:
                result = forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        recorder.note_state(before)
    if recorder.chooses:
        _note_sizes(recorder.recording, denoiser, forward, signature, args, kwargs)
    recorder.recording.output, opaque = recorder.refs(result)
    if opaque:
        raise TypeError(
            f"{type(denoiser).__name__} returns {type(result).__name__}, which may hide tensors; return tensors in "
            "tuples, lists, dicts or a diffusers BaseOutput (or register the class with torch.utils._pytree)"
        )
    return recorder.recording


def _note_sizes(recording, denoiser, forward, signature, args, kwargs):
    """Make no unit of calls beside one whose sizes change with the latent's values: seen in a forward with others."""
    seen, handles, latent = [], [], signature.latent(args, kwargs)
    if not isinstance(latent, torch.Tensor) or not latent.is_floating_point():
        return
    # A seed that no caller has, or the noise would be the latent's own.
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(-180_529)).to(latent)
    args, kwargs = signature.with_latent(*tree_map_only(torch.Tensor, copied_whole, (args, kwargs)), noise)
    for name, module in denoiser.named_modules():
        if name:

            def enter(module, args, kwargs, name=name):
                seen.append(
                    (name, [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)])
                )

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        with side_effects.restored(denoiser), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    recording.keep_together(seen, {name: type(module) for name, module in denoiser.named_modules()})


def copied_whole(x):
    """A clone that lies in its storage as `x` does: a patch reads the rows around its own."""
    try:
        storage = x.untyped_storage()
        if storage.nbytes() == x.numel() * x.element_size():
            return x.clone()
        return x.new_empty(0).set_(storage.clone(), x.storage_offset(), x.size(), x.stride())
    except (NotImplementedError, RuntimeError, AttributeError):
        return x.clone()
