"""A device that is not there: tensors name it as theirs, their numbers lie in the CPU's memory, and an operation that
mixes tensors of both fails as it would on a CUDA device. It shows tensors made on the wrong device, without any."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map


class Module(backend_registration._DummyBackendModule):
    """What torch.random asks a device for."""

    def get_rng_state(self, device=None):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    manual_seed = manual_seed_all = set_rng_state


backend_registration._setup_privateuseone_for_python_backend("pretended", backend_module=Module())
DEVICE = torch.device("pretended", 0)
# Operations that take tensors of both, and answer on the device of the first.
COPIES = {"copy_", "set_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor of the pretended device around one of the CPU."""

    @staticmethod
    def __new__(cls, here):
        return Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here):
        self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.here.tolist()

    def numpy(self):
        raise TypeError("a tensor of a device has no numpy array: copy it to the CPU first")

    @property
    def data(self):
        return Elsewhere(self.here)

    @data.setter
    def data(self, value):
        assert isinstance(value, Elsewhere), "data of another device"
        self.here = value.here

    def untyped_storage(self):
        return self.here.untyped_storage()

    def new_tensor(self, data, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or DEVICE)


def inside(x):
    return x.here if isinstance(x, Elsewhere) else x


def run(func, args, kwargs):
    """The operation on the CPU's numbers, after a look at where its tensors are."""
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    others = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
    first_is_there = isinstance(args[0], Elsewhere) if args else False
    if name in INDEXED and first_is_there:  # indices may stay on the CPU
        others = [x for x in args[2:3] if not isinstance(x, Elsewhere) and x.dim() > 0]
    target = kwargs.get("device")
    if there and others and name not in COPIES:
        raise RuntimeError(f"{func}: tensors of two devices, {[(x.device.type, tuple(x.shape)) for x in tensors]}")
    answers_there = bool(there) if target is None else torch.device(target).type == DEVICE.type
    if name in COPIES:
        answers_there = first_is_there
    generator = kwargs.get("generator")
    if answers_there and generator is not None:
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor of the device")
    if target is not None and torch.device(target).type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    if not answers_there:
        return out
    out = tree_map(lambda x: Elsewhere(x) if type(x) is Tensor else x, out)
    return out if target is not None or name == "lift_fresh" else return_and_correct_aliasing(func, args, kwargs, out)


class Factories(TorchDispatchMode):
    """Sees operations without a tensor, which a subclass of Tensor does not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def on(device):
    return device is not None and torch.device(device).type == DEVICE.type


@contextmanager
def pretending():
    """A context in which the device can be named."""
    tensor = torch.tensor  # this and as_tensor put their data in place below the modes

    def make(data, *, dtype=None, device=None, **rest):
        made = tensor(inside(data), dtype=dtype, **rest)
        return Elsewhere(made) if on(device) else made if device is None else made.to(device)

    def take(data, dtype=None, device=None):
        if isinstance(data, Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        return make(data, dtype=dtype, device=device)

    with mock.patch.object(torch, "tensor", make), mock.patch.object(torch, "as_tensor", take), Factories():
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model on the device, tied parameters still tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if id(x) not in made:
                    there = Elsewhere(x.detach().clone())
                    made[id(x)] = nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there
                tensors[name] = made[id(x)]
    return model
