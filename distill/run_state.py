"""Everything that a training step changes, copied to the CPU and put back bit by bit."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distill.probe import random_states_kept

__all__ = ["RunState", "draws_kept"]


class RunState:
    """Of a model its trainable weights and its buffers; an optimizer's state and settings; a scheduler's; a gradient
    scaler's (None: there is none). `restore` may be called any number of times.

    An optimizer that keeps state elsewhere than in `state` and `param_groups` cannot be copied. Nothing is kept on the
    device; sharded parameters (FSDP) are not for this.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, scheduler: Any, scaler: Any) -> None:
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self._others = [each for each in (scheduler, scaler) if each is not None]
        self._tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._tensors += list(model.buffers())
        self._kept_tensors = _kept([tensor.detach() for tensor in self._tensors])
        self._kept_state = _kept(dict(self._optimizer.state))
        self._kept_groups = [_kept(_settings(group)) for group in self._optimizer.param_groups]
        self._kept_others = [copy.deepcopy(each.state_dict()) for each in self._others]

    def restore(self) -> None:
        """Everything as it was; tensors keep their places in memory."""
        with torch.no_grad():
            for tensor, kept in zip(self._tensors, self._kept_tensors, strict=True):
                tensor.copy_(kept)
            state = self._optimizer.state
            for parameter in [parameter for parameter in state if parameter not in self._kept_state]:
                del state[parameter]  # begun since
            for parameter, kept in self._kept_state.items():
                state[parameter] = _restored(state[parameter], kept)
            for group, kept in zip(self._optimizer.param_groups, self._kept_groups, strict=True):
                group |= _restored(_settings(group), kept)
        for each, kept in zip(self._others, self._kept_others, strict=True):
            each.load_state_dict(copy.deepcopy(kept))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _kept(value: Any) -> Any:
    """A copy, tensors of it on the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _kept(each) for name, each in value.items()}
    return [_kept(each) for each in value] if isinstance(value, list) else copy.deepcopy(value)


def _restored(live: Any, kept: Any) -> Any:
    """What was kept, in the live tensors where there are any."""
    if torch.is_tensor(live) and torch.is_tensor(kept):
        return live.copy_(kept)
    if isinstance(live, dict) and isinstance(kept, dict):
        return {name: _restored(live.get(name), each) for name, each in kept.items()}
    return copy.deepcopy(kept)


@contextmanager
def draws_kept(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """What is drawn at random inside is drawn again after it: torch's numbers, numpy's and Python's."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with random_states_kept(parameters):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
