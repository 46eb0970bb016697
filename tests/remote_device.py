"""A device without float64, played on the CPU: what Apple's MPS would refuse is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("mps:0")
# May mix devices, as on real ones: copies, and places that are looked up.
_MIXED = {"aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put", "aten::index_put_"}


class RemoteTensor(Tensor):
    """Says that it is on :data:`DEVICE`; its numbers lie on the CPU.

    PyTorch's own code takes it for one on the meta device, the only other kind that every build knows.
    """

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> RemoteTensor:
        made = Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device="meta"
        )
        made.numbers = numbers
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class RemoteDevice(TorchDispatchMode):
    """Inside, tensors can be moved to and made on :data:`DEVICE`.

    Raises:
        TypeError: When a tensor on it would be float64.
        RuntimeError: When an operation mixes it with the CPU.
    """

    def __enter__(self) -> RemoteDevice:
        self.from_lists = _FromLists()
        self.from_lists.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.from_lists.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromLists(TorchFunctionMode):
    """``torch.tensor`` makes its tensors on the CPU, out of sight of the dispatcher, before it moves them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return torch.tensor(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    remote = [value for value in tensors if isinstance(value, RemoteTensor)]
    name = f"{func._schema.name}.{func._overloadname}" if func._overloadname == "Tensor" else func._schema.name
    near = [value for value in tensors if not isinstance(value, RemoteTensor) and value.dim()]
    if remote and near and not {name, func._schema.name} & _MIXED:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    device = kwargs.get("device")
    stays = bool(remote) if device is None else torch.device(device).type == DEVICE.type
    if "aten::copy_" in name:
        stays = isinstance(args[0], RemoteTensor)
    kwargs = {**kwargs, **({} if device is None else {"device": torch.device("cpu")})}
    bare = tree_map(lambda value: value.numbers if isinstance(value, RemoteTensor) else value, (list(args), kwargs))
    known = {id(value.numbers): value for value in remote}  # what is written in place stays the same tensor

    def dress(value: Any) -> Any:
        if not isinstance(value, Tensor) or not stays:
            return value
        if value.dtype == torch.float64:
            raise TypeError(f"{name}: cannot convert an MPS tensor to float64: the MPS framework does not support it")
        return known.get(id(value)) if id(value) in known else RemoteTensor(value)

    return tree_map(dress, func(*bare[0], **bare[1]))
