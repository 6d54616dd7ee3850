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
# What diffusers calls a model's weights.
_STEM = "diffusion_pytorch_model"


class Checkpoint:
    """The tensors of one model's folder, of the files that `from_pretrained` reads: others may lie beside them.

    Args:
        folder: with a safetensors file, or several and their index.
        variant: part of the files' names, "fp16" say; where there are none of it, those without.
    Raises: ValueError if there are no such files, or one is not whole.
    """

    def __init__(self, folder, variant=None):
        self.folder, self._places = Path(folder), {}
        for path in _files(self.folder, variant):
            start, header = _header(path)
            self._places |= {name: (path, start, entry) for name, entry in header.items()}

    def __contains__(self, name):
        return name in self._places

    def dtype(self, name):
        """Of a tensor, as it is saved."""
        return _DTYPES[self._entry(name)[2]["dtype"]]

    def shape(self, name):
        """Of a tensor, as it is saved."""
        return torch.Size(self._entry(name)[2]["shape"])

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
                    raise ValueError(f"{path} has become shorter since it was opened: load the pipeline anew")
                done += count
        return flat.view(_DTYPES[entry["dtype"]]).view(entry["shape"])

    def _entry(self, name):
        if name not in self._places:
            raise ValueError(
                f"{self.folder} has no weights for {name}: it holds another model than its config says, or one that "
                "uses a weight twice, which only from_pretrained loads"
            )
        return self._places[name]


def _files(folder, variant):
    """The files of a model's weights, in the order in which diffusers looks for them."""
    for kind in ([variant] if variant else []) + [None]:
        part = f".{kind}" if kind else ""
        index, single = folder / f"{_STEM}.safetensors.index{part}.json", folder / f"{_STEM}{part}.safetensors"
        if index.is_file():
            files = [folder / name for name in sorted(set(_shards(index)))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise ValueError(f"{index} names {missing[0]}, which is not there: copy the folder anew")
            return files
        if single.is_file():
            return [single]
    found = ", ".join(sorted(path.name for path in folder.glob("*") if path.name != "config.json")[:3])
    raise ValueError(
        f"load reads {_STEM}.safetensors, or its shards and {_STEM}.safetensors.index.json: got {found or 'nothing'} "
        f"in {folder}; save the model by save_pretrained, with safetensors, or pass the variant= that it was saved with"
    )


def _shards(index):
    """Names of files in an index."""
    try:
        return [str(name) for name in json.loads(index.read_text())["weight_map"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is no index of safetensors files: copy the folder anew") from None


def _header(path):
    """(where the numbers of a safetensors file begin, {name: its entry})."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        odd = [entry["dtype"] for entry in header.values() if entry["dtype"] not in _DTYPES]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is no safetensors file, or is broken: copy it anew") from None
    if odd:
        raise ValueError(f"load knows weights of {', '.join(_DTYPES)}: got {odd[0]} in {path}; use from_pretrained")
    if max(ends, default=0) > size - 8 - length:
        raise ValueError(f"{path} ends in the middle of its weights: copy it anew")
    return 8 + length, header
