"""Weights in a `save_pretrained` folder, read one tensor at a time and never mapped into memory as a whole."""

import json
from pathlib import Path

import torch

# Names of types in the header of a safetensors file.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Checkpoint:
    """The tensors of one model's folder.

    Args:
        folder: with a safetensors file, or several and an index.
        variant: part of the files' names, "fp16" say.
    Raises: ValueError if there are no such files.
    """

    def __init__(self, folder, variant=None):
        self.folder, self._places = Path(folder), {}
        stem = f"*.{variant}.safetensors" if variant else "*.safetensors"
        files = sorted(self.folder.glob(stem))
        if variant is None:
            # Those of a variant have one part of their name more.
            files = [f for f in files if len(f.name.split(".")) == 2] or files
        if not files:
            raise ValueError(f"no {stem} in {self.folder}: save the model by save_pretrained, with safetensors")
        for path in files:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._places |= {name: (path, 8 + length, entry) for name, entry in header.items()}

    def __contains__(self, name):
        return name in self._places

    def dtype(self, name):
        """Of a tensor, as it is saved."""
        return _DTYPES[self._entry(name)[2]["dtype"]]

    def read(self, name):
        """A tensor on the CPU. Raises: ValueError if it is not there."""
        path, start, entry = self._entry(name)
        begin, end = entry["data_offsets"]
        flat = torch.empty(end - begin, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as file:
            file.seek(start + begin)
            view, done = memoryview(flat.numpy()), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{path} ends in the middle of {name}: copy it anew")
                done += count
        return flat.view(_DTYPES[entry["dtype"]]).view(entry["shape"])

    def _entry(self, name):
        if name not in self._places:
            raise ValueError(f"{self.folder} has no weights for {name}: it holds another model than its config says")
        return self._places[name]
