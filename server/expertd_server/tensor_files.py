"""The safetensors files of one checkpoint: which tensor lies where, and reading one of them without its neighbours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from expertd_server.errors import CheckpointError

__all__ = ["TensorFiles", "TensorInfo", "read_json"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about a tensor."""

    dtype: str
    """As safetensors spells it: F8_E4M3, BF16, F32, ..."""
    shape: tuple[int, ...]


class TensorFiles:
    """Tensors by name, read one at a time through mmap: what is not asked for is not read.

    path: a directory with model.safetensors.index.json or model.safetensors, or one .safetensors file.
    `tensors_read` and `bytes_read` count what `read` has handed out.
    Raises CheckpointError when a file that the index names is missing, or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._is_one_file = path.is_file()
        self.directory = path.parent if self._is_one_file else path
        self.tensors_read = 0
        self.bytes_read = 0
        self._open_files: dict[str, Any] = {}
        self._file_of = self._locate(path)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that the index (or the single file) names, sorted."""
        return tuple(sorted(self._file_of))

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that hold them, sorted."""
        return tuple(sorted(set(self._file_of.values())))

    def unindexed_files(self) -> tuple[str, ...]:
        """safetensors files of the directory that are no part of the checkpoint; none where one file was asked for."""
        if self._is_one_file:
            return ()
        present = {p.name for p in self.directory.glob("*.safetensors")}
        return tuple(sorted(present - set(self.file_names)))

    def unindexed_tensors(self) -> tuple[str, ...]:
        """Tensors that lie in the indexed files and that the index does not name. Opens every file."""
        held = {name for file_name in self.file_names for name in self._open(file_name).keys()}  # noqa: SIM118
        return tuple(sorted(held - set(self._file_of)))

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor, from the header alone."""
        header = self._slice(name)
        return TensorInfo(dtype=header.get_dtype(), shape=tuple(header.get_shape()))

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU. Its memory is the mapped file: copy it, never write to it."""
        self._slice(name)  # a missing tensor is reported as one
        try:
            tensor: torch.Tensor = self._open(self._file_of[name]).get_tensor(name)
        except (SafetensorError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{name} in {self._file_of[name]} cannot be read: {error}") from error
        self.tensors_read += 1
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _slice(self, name: str) -> Any:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{name} is not in the checkpoint {self.directory}")
        try:
            return self._open(file_name).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{name} should be in {file_name} by {INDEX_NAME}, but is not: index and files are not of one "
                f"checkpoint; download it again ({error})"
            ) from error

    def _open(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            try:
                self._open_files[file_name] = safe_open(str(self.directory / file_name), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.directory / file_name} is not a whole safetensors file: {error}; download it again"
                ) from error
        return self._open_files[file_name]

    def _locate(self, path: Path) -> dict[str, str]:
        if self._is_one_file and path.suffix == ".safetensors":
            return dict.fromkeys(self._open(path.name).keys(), path.name)
        if not path.is_dir():
            raise CheckpointError(f"{path} is neither a directory nor a .safetensors file")
        if (path / INDEX_NAME).is_file():
            return self._read_index(path / INDEX_NAME)
        if (path / SINGLE_NAME).is_file():
            return dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)
        if any(next(path.glob(pattern), None) for pattern in PICKLE_PATTERNS):
            raise CheckpointError(
                f"{path} holds pickled weights only, which are never opened because they can run code; save the model "
                f"with save_pretrained(..., safe_serialization=True)"
            )
        raise CheckpointError(f"{path} holds neither {INDEX_NAME} nor {SINGLE_NAME}")

    def _read_index(self, index_path: Path) -> dict[str, str]:
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index_path} has no weight_map from tensor names to file names")
        for file_name in sorted(set(weight_map.values())):
            if Path(file_name).name != file_name:
                raise CheckpointError(f"{index_path} names {file_name!r}, expected a file beside it")
            if not (self.directory / file_name).is_file():
                missing = sum(1 for v in weight_map.values() if v == file_name)
                raise CheckpointError(
                    f"{self.directory / file_name} is missing: {index_path.name} puts {missing} tensors into it; "
                    f"finish the download"
                )
        return dict(weight_map)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value
