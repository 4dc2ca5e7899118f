"""One step of a causal language model of transformers over a cache whose addresses and shapes never change: one CUDA graph.

A transformers cache grows, and its layers are written where Python integers say. Here each of its layers becomes one of fixed
size, written where a tensor says, so that a step is always the same kernels on the same memory. On a GPU they are captured
once and replayed, which costs one launch a token. Without the graph a step runs anywhere, which is how it is tested.

Attention reads all positions that there is room for, and the mask hides those that are not filled. Layers with a sliding window
or chunks keep all positions too, because their window's mask follows from the positions alone.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer

_ALIGNMENT = 8  # positions: masks of other lengths are padded by the attention kernels, layer by layer


class NotStaticError(Exception):
    """Why a model's step cannot run over fixed memory."""


class PlacedLayer(StaticLayer):
    """Keys and values [batch, heads, room, width], written at the position (int64, no dimensions) that all layers share.

    Whoever runs the model moves the position on, once a step.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, position: Tensor, room: int) -> None:
        super().__init__(max_cache_len=room)  # type: ignore[no-untyped-call]
        assert layer.keys is not None
        assert layer.values is not None
        self.cumulative_length = position
        self.is_sliding = layer.is_sliding
        self.device, self.dtype = layer.keys.device, layer.keys.dtype
        self.keys, self.values = (
            tensor.new_zeros((*tensor.shape[:2], room, tensor.shape[3])) for tensor in (layer.keys, layer.values)
        )
        self.is_initialized = True

    def load(self, layer: DynamicLayer, length: int) -> None:
        """Take over what a layer holds of `length` tokens: all, or the last ones where it slides."""
        assert layer.keys is not None
        assert layer.values is not None
        for buffer, held in ((self.keys, layer.keys), (self.values, layer.values)):
            buffer.zero_()  # what the mask leaves out must be finite all the same
            buffer[:, :, length - held.shape[2] : length] = held

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens = key_states.shape[2]
        places = self.cumulative_length.view(1)
        if tokens > 1:
            places = places + torch.arange(tokens, device=places.device)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values


class StaticStep:
    """Steps of a module over a static copy of one of its caches; `load` fills the copy again from another of its caches."""

    def __init__(self, module: nn.Module, cache: Any, *, name: str, more: dict[str, Any], capacity: int) -> None:
        """name: of forward's argument for the cache; more: its other arguments; capacity: tokens a sequence.

        Raises NotStaticError where the cache or the module is known not to work with fixed memory. Others may still give wrong
        results: the caller compares a step with the module's own.
        """
        if any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
            raise NotStaticError("a module has a hook, which a graph would not call")
        if len({parameter.device for parameter in module.parameters()}) > 1:
            raise NotStaticError("the model is spread over several devices")
        self._module, self._more, self._name = module, more, name
        self._device = next(module.parameters()).device
        self._position = torch.zeros((), dtype=torch.int64, device=self._device)
        self._places = torch.arange(-(-capacity // _ALIGNMENT) * _ALIGNMENT, device=self._device)
        self._cache = copy.copy(cache)
        self._cache.layers = [self._static_layer(layer) for layer in _layers(cache)]
        self._attends = any(isinstance(layer, PlacedLayer) for layer in self._cache.layers)
        if self._attends and not getattr(module, "_can_compile_fullgraph", False):
            raise NotStaticError(f"{type(module).__name__} does not support a static cache")
        self._accepted = inspect.signature(module.forward).parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = torch.empty(0)
        self._logits = torch.empty(0)

    def _static_layer(self, layer: Any) -> Any:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
            return PlacedLayer(layer, self._position, len(self._places))
        if type(layer) is LinearAttentionLayer and not layer.record_past:
            return copy.deepcopy(layer)  # it is written in place, as `capture` makes sure
        raise NotStaticError(f"no static counterpart of a cache's {type(layer).__name__}")

    def load(self, cache: Any, length: int) -> None:
        """Go on from a cache of the module that holds `length` tokens of each sequence. The cache is left as it is."""
        for ours, theirs in zip(self._cache.layers, _layers(cache), strict=True):
            if isinstance(ours, PlacedLayer):
                ours.load(theirs, length)
                continue
            for kind in ("conv_states", "recurrent_states"):
                for index, state in getattr(ours, kind).items():
                    if state is not None:
                        state.copy_(getattr(theirs, kind)[index])
        self._position.fill_(length)

    def rewind(self, length: int) -> bool:
        """Forget all but the first `length` tokens. False, and nothing is done, where a layer cannot."""
        if not all(isinstance(layer, PlacedLayer) for layer in self._cache.layers):
            return False
        self._position.fill_(length)  # the mask hides what lies behind it, and the next tokens overwrite it
        return True

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] of what follows ids [batch, tokens], which are added to the cache."""
        if self._graph is None or ids.shape[1] != 1:
            return self._run(ids)
        self._ids.copy_(ids)
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._logits.clone()  # the next step writes there

    def _run(self, ids: Tensor) -> Tensor:
        batch, tokens = ids.shape
        positions = self._position + self._places[:tokens]
        given: dict[str, Any] = {**self._more, self._name: self._cache}
        if "position_ids" in self._accepted:  # else some models make them of a length that the CPU would wait for
            given["position_ids"] = positions.expand(batch, -1)
        if self._attends and "attention_mask" in self._accepted:  # models with ALiBi count along it; so does OPT
            given["attention_mask"] = (self._places <= positions[-1]).long().expand(batch, -1)
        logits: Tensor = self._module(input_ids=ids, **given).logits[:, -1]
        self._position.add_(tokens)
        return logits

    @torch.inference_mode()
    def capture(self, cache: Any, length: int, batch: int) -> None:
        """Make the graph of a step of one token, then go on from the cache as `load` does.

        Raises NotStaticError or what torch raises where the step cannot be captured: this object is then of no more use; the
        cache and torch are as before.
        """
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        with torch.cuda.device(self._device):
            self._warm_up(cache, length)
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            clone = generator.clone_state()
            try:
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._logits = self._run(self._ids)
            except BaseException:  # torch would stay on the capture's stream, and its generator go on as if captured
                torch.cuda.set_stream(current)
                generator.graphsafe_set_state(clone)
                raise
        self._graph = graph
        self.load(cache, length)  # capturing runs nothing, but the warm-up did

    def _warm_up(self, cache: Any, length: int) -> None:
        """Twice on a stream of its own: kernels compile and libraries allocate; then nothing may wait for the GPU."""
        self.load(cache, length)
        before, mode = self.layout(), torch.cuda.get_sync_debug_mode()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the mode does not find everything
            try:
                with torch.cuda.stream(stream):
                    self._run(self._ids)
                    self.load(cache, length)
                    torch.cuda.set_sync_debug_mode("error")  # a failure here is harmless, one while capturing less so
                    self._run(self._ids)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                current.wait_stream(stream)
        if self.layout() != before:
            raise NotStaticError("a step does not write its cache in place")

    def layout(self) -> list[Any]:
        """What a graph takes for granted, layer by layer: where the cache's tensors lie, and all that is no tensor."""
        return [_layout(vars(layer)) for layer in self._cache.layers]


def _layers(cache: Any) -> list[Any]:
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise NotStaticError(f"a cache of another kind, {type(cache).__name__}")
    return layers


def _layout(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.data_ptr(), found.shape, found.dtype
    return {key: _layout(value) for key, value in found.items()} if isinstance(found, dict) else found


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits [batch, vocabulary], computed in `dtype` in two orders, are the same but for rounding."""
    tolerance = {torch.float16: 3e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-3)
    expected = expected.float()
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return bool(((found.float() - expected).norm(dim=-1) <= tolerance * spread).all())
