"""The one writer: text, JSON and safetensors, each written under a temporary name, synced, then renamed."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as _to_bytes
from torch import Tensor


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: where to write; missing folders are made.
        data: the content.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text; see :func:`write_bytes`."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON; dataclasses and tensors are converted, NaN and infinities become null."""
    return write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write tensors as safetensors, with ``metadata`` as JSON in the header."""
    tensors = {name: value.detach().contiguous().cpu().clone() for name, value in arrays.items()}
    return write_bytes(path, _to_bytes(tensors, {"dropscope": json.dumps(plain(metadata or {}), allow_nan=False)}))


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_arrays` wrote: tensors and metadata. Nothing is unpickled."""
    with safe_open(str(path), framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("dropscope", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def plain(value: Any) -> Any:
    """Return ``value`` as what JSON knows: dicts, lists, strings, finite numbers, booleans and None."""
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return str(value)
    raise TypeError(
        f"plain: value must be a number, string, tensor, dataclass, list or dict, got {type(value).__name__}"
    )
