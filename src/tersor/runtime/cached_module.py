"""Any causal language model of transformers, token by token with the cache that its own class makes.

On a GPU, a step of one token is one CUDA graph over a static copy of that cache (`static_step.py`), where the model allows it.
Elsewhere, after the prompt, the cache's plain attention layers get buffers for all positions to come: a token is written into
its place, and only the filled places are attended to (transformers copies the whole cache to make it one longer). Sliding
windows, recurrent states and other layers stay as the model made them. A model that keeps no cache sees the whole sequence
again for every token.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from tersor.runtime.engine import check_room
from tersor.runtime.static_step import StaticStep, agree

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # the argument's name, which depends on version and model


class StaticGrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [batch, heads, tokens, width] that are views of buffers with room for `capacity` tokens."""

    def __init__(self, layer: DynamicLayer, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        self.capacity = capacity
        self.buffers = [_with_room(tensor, capacity) for tensor in (keys, values)]
        self.device, self.dtype = keys.device, keys.dtype
        self.keys, self.values = (b[:, :, : layer.get_seq_length()] for b in self.buffers)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


_PLAIN = (DynamicLayer, StaticGrowingLayer)  # layers whose last tokens can be taken off


def _with_room(tensor: Tensor, capacity: int) -> Tensor:
    buffer = tensor.new_zeros((*tensor.shape[:2], capacity, tensor.shape[3]))
    buffer[:, :, : tensor.shape[2]] = tensor
    return buffer


def why_not(module: nn.Module) -> str | None:
    """Why this model cannot continue a text; None where it can."""
    if not getattr(module, "can_generate", lambda: False)():
        return f"{type(module).__name__} is no model that generates text"
    if getattr(module.config, "is_encoder_decoder", False):
        return f"{type(module).__name__} translates one sequence into another and does not continue a text"
    return None


class CachedModule:
    """As LlamaCPU, for a module for which `why_not` is None.

    why_no_graph: why a step is no CUDA graph; None where it is one, or may become one at the first step of one token.
    """

    def __init__(self, module: nn.Module, *, capacity: int, batch: int = 1) -> None:
        self.module, self.capacity, self.batch, self.length = module, capacity, batch, 0
        self.device = next(module.parameters()).device
        self.why_no_graph: str | None = None if self.device.type == "cuda" else f"it runs on {self.device.type}"
        accepted = inspect.signature(module.forward).parameters
        self._name = next((name for name in _CACHE_NAMES if name in accepted), None)
        self._more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._more |= {"use_cache": True} if "use_cache" in accepted else {}
        self._cache: Any = None
        self._seen: Tensor | None = None
        self._step: StaticStep | None = None
        self._recurrent = False  # whether the cache holds states that go from token to token
        self._in_step = False  # where the text is: in the step's own cache, or in _cache

    @property
    def graphed(self) -> bool:
        """Whether a step of one token is a CUDA graph."""
        return self._step is not None

    def reset(self) -> None:
        """Start new sequences."""
        self.length, self._cache, self._seen, self._in_step = 0, None, None, False

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; all of them where the cache holds more than plain keys and values."""
        if length >= self.length:
            return
        if length <= 0 or not self._cut(length):
            self.reset()
        else:
            self.length = length

    def _cut(self, length: int) -> bool:
        if self._in_step:
            return self._step is not None and self._step.rewind(length)
        if self._cache is None:
            self._seen = None if self._seen is None else self._seen[:, :length]
            return self._seen is not None
        layers = getattr(self._cache, "layers", None)
        if not isinstance(layers, list) or any(type(each) not in _PLAIN for each in layers):
            return False
        for layer in layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return True

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary], float32, of what follows ids [batch, tokens], which are added to the cache."""
        check_room(self, ids)
        tokens = ids.shape[1]
        if tokens > 1 and self.length and self._recurrent:  # several tokens at once would begin a new text
            for token in torch.split(ids, 1, dim=1):
                logits = self.forward(token)
            return logits
        ids = ids.to(self.device)
        if tokens == 1 and self._step is not None and self._cache is not None:
            self._step.load(self._cache, self.length)
            self._cache, self._in_step = None, True
        if self._in_step and self._step is not None:
            logits = self._step.forward(ids)
        elif tokens == 1 and self._cache is not None and self.why_no_graph is None:
            logits = self._first_step(ids)
        else:
            logits = self._plain(ids)
        self.length += tokens
        return logits.float()

    def _plain(self, ids: Tensor) -> Tensor:
        """One call of the module with the cache that it made."""
        if self._cache is None and self._seen is not None:  # it keeps no cache
            ids = torch.cat([self._seen, ids], dim=1)
        given: dict[str, Any] = dict(self._more)  # and no mask: nothing is padded, and recurrent models want none
        if self._cache is not None and self._name is not None:
            given[self._name] = self._cache
        output = self.module(input_ids=ids, **given)
        self._cache = None if self._name is None else getattr(output, self._name, None)
        layers = getattr(self._cache, "layers", None)
        self._recurrent = isinstance(layers, list) and any(isinstance(each, LinearAttentionLayer) for each in layers)
        if self._cache is None:
            self._seen, self.why_no_graph = ids, "it keeps no cache"
        elif self.why_no_graph is not None:
            _make_room(self._cache, self.capacity)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _first_step(self, ids: Tensor) -> Tensor:
        """Runs one step both plainly and, where a graph can be made, by the graph. The graph stays if the two agree.

        It works on a copy of the cache, so nothing has changed where no graph comes of it.
        """
        try:
            step = StaticStep(self.module, self._cache, name=str(self._name), more=self._more, capacity=self.capacity)
            step.capture(self._cache, self.length, self.batch)
            found = step.forward(ids)
        except Exception as error:  # whatever a model does that was not made for this
            self.why_no_graph = f"{type(error).__name__}: {error}".splitlines()[0]
            return self._plain(ids)
        logits = self._plain(ids)
        if agree(found, logits, next(self.module.parameters()).dtype):
            self._step, self._cache, self._in_step = step, None, True
        else:
            self.why_no_graph = "a step over a static cache gives other logits"
        return logits


def _make_room(cache: Any, capacity: int) -> None:
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        return
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized and layer.get_seq_length():
            layers[index] = StaticGrowingLayer(layer, capacity)
