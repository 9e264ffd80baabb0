"""The state of optimizers and random number generators as tensors and JSON, and back, exactly.

An optimizer numbers its parameters. Here they have their names in the model, so that state finds
its parameter in a run with another number of processes or another sharding.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitnet.training.checkpoint import Checkpoint


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON of the same structure. Tensors go to ``tensors`` under their path. Tuples and
    dicts with integer keys do not exist in JSON, so tuples and dicts are tagged."""
    if isinstance(value, Tensor):
        assert name not in tensors, name
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[key, flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: cannot be saved without pickle: {type(value).__name__}")


def unflatten(value: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of :func:`flatten`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "tuple":
        return tuple(unflatten(item, tensors) for item in content)
    assert tag == "dict", tag
    return {key: unflatten(item, tensors) for key, item in content}


def _named_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter, in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    return {names[id(parameter)]: parameter for parameter in ordered}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], Any]:
    """An optimizer's state as tensors (its own memory, not copies) and JSON (the rest, exactly).

    Arguments:
        model: the model whose parameters the optimizer updates.
    """
    names = list(_named_parameters(optimizer, model))
    state = optimizer.state_dict()
    state["state"] = {names[number]: value for number, value in state["state"].items()}
    state["param_groups"] = [
        group | {"params": [names[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    tensors: dict[str, Tensor] = {}
    return tensors, flatten(state, "optimizer", tensors)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    saved: Checkpoint,
    group: str,
    structure: Any,
) -> None:
    """The inverse of :func:`optimizer_tensors`, for any present sharding of the parameters.

    Arguments:
        group: of the checkpoint's tensors.
    Raises:
        ValueError: the state belongs to other parameters, or PyTorch cast it to its parameter's
            dtype, so that training would not continue exactly.
    """
    parameters = _named_parameters(optimizer, model)
    names, stored = list(parameters), saved.contents[group]
    where = _numbered(unflatten(structure, {name: name for name in stored}), names)
    likes = {
        tensor: parameters[names[number]]
        for number, values in where["state"].items()
        for tensor in values.values()
        if isinstance(tensor, str)
    }
    targets = {name: tensor.zeros(likes.get(name)) for name, tensor in stored.items()}
    saved.read_into(group, targets)
    state = _numbered(unflatten(structure, targets), names)
    optimizer.load_state_dict(state)
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            was = state["state"][number][key]
            if isinstance(value, Tensor) and value.dtype != was.dtype:
                name = f"{names[number]}.{key}"
                raise ValueError(f"{name}: saved as {was.dtype}, loaded as {value.dtype}")


def _numbered(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state with numbers for names; older checkpoints already have numbers."""
    groups = state["param_groups"]
    saved = [name for group in groups for name in group["params"]]
    if saved == list(range(len(names))):
        return state
    if saved != names:
        differ = sorted(set(map(str, saved)) ^ set(names)) or ["the order of parameters"]
        raise ValueError(f"the optimizer's state is of other parameters: {differ[0]} differs")
    numbers = {name: number for number, name in enumerate(names)}
    numbered = [g | {"params": [numbers[name] for name in g["params"]]} for g in groups]
    values = {numbers[name]: value for name, value in state["state"].items()}
    return state | {"state": values, "param_groups": numbered}


def _to_hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's (global) and torch's generators (CPU, every CUDA device), as
    JSON."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy,
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in torch.cuda.get_rng_state_all()],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The inverse of :func:`rng_state`. Skips states of CUDA devices that do not exist here:
    nothing draws from them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": key}})
    torch.set_rng_state(_from_hex(state["torch"]))
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(saved), device)
