"""How every result of an analysis is written."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dropscope import _files


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """What an analysis returns: a frozen dataclass that can be written."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result.

        Args:
            path: ``.json`` for readable numbers, ``.safetensors`` for tensors at full precision with the rest as
                metadata.

        Returns:
            The path.

        Raises:
            ValueError: if the ending is another one.
        """
        suffix = Path(path).suffix
        content: dict[str, Any] = {"type": type(self).__name__}
        content |= {item.name: getattr(self, item.name) for item in fields(self)}
        if suffix == ".json":
            return _files.write_json(path, content)
        if suffix == ".safetensors":
            arrays = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
            return _files.write_arrays(path, arrays, {k: v for k, v in content.items() if k not in arrays})
        raise ValueError(f"save: path must end in .json or .safetensors, got {str(path)!r}")
