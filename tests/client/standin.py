"""A stand-in for a GPU: tensors that lie on the CPU, say that they do not, and mix with none there.

While a ``StandIn`` lasts, the device called ``meta`` takes tensors as CUDA does. What CUDA would
refuse is refused: operations on tensors of both sides, and numpy on the device's own.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = "meta"
MOVING = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put_")
"""Take places on the CPU for tensors on the device, though not the other way round."""


class There(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device=torch.device(DEVICE),
        )  # fmt: skip

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f"There({self.here})"

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {}, float64=True)


class StandIn(TorchDispatchMode):
    """Makes the device there while it lasts, and counts the operations that it does.

    Parameters
    ----------
    float64
        Whether the device can compute in it.
    """

    def __init__(self, *, float64=True):
        super().__init__()
        self.float64 = float64
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = _computed(func, args, kwargs or {}, self.float64)
        self.operations += isinstance(found, There)
        return found


def _computed(func, args, kwargs, float64):
    name = func._schema.name
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    mixed = bool(there) and any(t.dim() > 0 and not isinstance(t, There) for t in tensors)
    allowed = name in MOVING or (name in INDEXING and isinstance(args[0], There))
    if mixed and not allowed:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    args_here, kwargs_here = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
    stays = bool(there)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == DEVICE
        kwargs_here = {**kwargs_here, "device": torch.device("cpu")}
    found = func(*args_here, **kwargs_here)
    if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
        return args[0] if found is args_here[0] else found
    if stays and not float64 and name not in ("aten::empty",):  # which computes nothing
        wide = [t for t in tree_flatten(found)[0] if getattr(t, "dtype", None) == torch.float64]
        if wide:
            raise TypeError(f"{name}: the device does not know float64")
    return tree_map_only(torch.Tensor, There, found) if stays else found
