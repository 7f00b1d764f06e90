"""Weight files that people have, read without running anything that is in them.

A `.pt` file is a zip of a pickle and of raw numbers, and a pickle can name any function to be called. Of safetensors
and of plain state dicts the libraries make tensors only; OpenAI's files are TorchScript archives, which PyTorch opens
as programs, so their pickle is read here by an unpickler that knows how to make tensors and nothing else.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from armchair.errors import RequestError

_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_WRAPPERS = ("module.", "_orig_mod.")  # what training scripts leave before names
_MOST_PICKLE = 64 << 20  # bytes; the numbers are beside it


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file, a PyTorch state dict, or a TorchScript archive.

    A dict with the state dict under `state_dict`, as training scripts save it, is looked into. Raises RequestError for
    a file that is not one of these, or that asks for anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _flat(_Archive(archive).load())
        found = torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise RequestError(f"{path}: not a safetensors file: {error}") from None
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
    ) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RequestError(f"{path}: not a file of weights alone: {reason}") from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not found or not all(isinstance(w, Tensor) for w in found.values()):
        raise RequestError(f"{path}: expected a state dict, names with tensors")
    return {_plain(name): w for name, w in found.items()}


class _Module:
    """What stands for any class of the archive: its attributes, and no behaviour."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module's state is not a dict")
        self.attributes = state


class _Archive(pickle.Unpickler):
    """`data.pkl` of a TorchScript archive."""

    def __init__(self, archive: zipfile.ZipFile):
        (name,) = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if archive.getinfo(name).file_size > _MOST_PICKLE:
            raise pickle.UnpicklingError(f"{name} would unpack to over {_MOST_PICKLE} bytes")
        super().__init__(io.BytesIO(archive.read(name)))
        self._archive, self._folder = archive, name.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name in _TYPES:
            return name
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch.jit._pickle":
            return lambda value, *rest: value  # typed lists and dicts
        if module.startswith("__torch__"):
            return _Module
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, kind, key, _, count = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            whole = torch.frombuffer(data, dtype=_TYPES[kind]) if data else torch.empty(0, dtype=_TYPES[kind])
            if len(whole) != count:
                raise pickle.UnpicklingError(f"storage {key} has {len(whole)} numbers, expected {count}")
            self._storages[key] = whole
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()


def _flat(module: Any, prefix: str = "") -> dict[str, Tensor]:
    if not isinstance(module, _Module):
        raise pickle.UnpicklingError("it holds no module")
    found: dict[str, Tensor] = {}
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Module):
            found |= _flat(value, f"{prefix}{name}.")
    return found


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
