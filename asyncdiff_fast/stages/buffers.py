"""Memory of one denoiser: long-lived buffers that travel, and placeholders for results that nobody here reads."""

import torch

DEPTH = 2
# Numbers that can be multiplied and added: no integers, no truth values, no 8-bit floats.
PREDICTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _dense_strides(ref):
    """The strides of a tensor if its elements fill one block of memory, else contiguous ones."""
    strides = ref.layout[1]
    extent = 1 + sum((n - 1) * s for n, s in zip(ref.shape, strides, strict=True))
    numel = ref.nbytes // getattr(torch, ref.dtype).itemsize
    if numel and extent == numel:
        return strides
    return torch.empty(ref.shape, device="meta").stride()


class Buffer:
    """`depth` copies of one tensor. `flat` is what travels; `view(epoch)` has the shape and strides of the original."""

    def __init__(self, ref, device, depth=DEPTH):
        numel = ref.nbytes // getattr(torch, ref.dtype).itemsize
        # Ordinary tensors, whatever mode the first call runs in: they are written in later ones too.
        with torch.inference_mode(False):
            self.flat = tuple(torch.zeros(numel, dtype=getattr(torch, ref.dtype), device=device) for _ in range(depth))
            strides = _dense_strides(ref)
            self._views = tuple(flat.as_strided(ref.shape, strides) for flat in self.flat)
        self.predictable = getattr(torch, ref.dtype) in PREDICTABLE

    def view(self, epoch):
        """The tensor of one epoch."""
        return self._views[epoch % len(self._views)]


class Placeholders:
    """Tensors of the right shape whose content does not matter; all of one dtype share their memory."""

    def __init__(self, device):
        self._device = device
        self._memory = {}
        self._tensors = {}

    def get(self, ref, alone=False):
        """A tensor like `ref`, finite, not to be relied upon; `alone`: in memory of its own, to be written into."""
        key = (ref.shape, ref.dtype, ref.layout, ref.storage if alone else None)
        if key not in self._tensors:
            with torch.inference_mode(False):
                block = Buffer(ref, self._device).flat[0] if alone else self._block(ref)
                self._tensors[key] = block.as_strided(ref.shape, _dense_strides(ref))
        return self._tensors[key]

    def _block(self, ref):
        dtype = getattr(torch, ref.dtype)
        block = self._memory.get(dtype)
        if block is None or block.numel() * dtype.itemsize < ref.nbytes:
            self._memory[dtype] = block = torch.zeros(ref.nbytes // dtype.itemsize, dtype=dtype, device=self._device)
        return block

    def holds(self, tensor):
        """True if a tensor lies in the memory of placeholders."""
        block = self._memory.get(tensor.dtype)
        return block is not None and tensor.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
