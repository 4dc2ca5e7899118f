"""The decoder of the LLaMA family on a GPU: one CUDA graph a token, over a static key-value cache.

    h = h + W_o attention(rope(W_q n), rope(W_k n), W_v n),   n = rms_norm(h)
    h = h + W_down (silu(W_gate n) * W_up n),                 n = rms_norm(h)

Takes the models that `llama_cpu.py` takes, in float16 or bfloat16, packed or not. W_q, W_k and W_v are one matmul, W_gate and
W_up another, where their weights can be joined; `kernels/decode_triton.py` does the rest of a layer in five or six kernels.
On Hopper a token of a single sequence can go through all layers in one launch instead (`kernels/llama_step.py`); which of the
two is faster is measured on the GPU at hand with the first token.

A step reads the tokens, and where they belong, from the device, and leaves the likeliest next tokens and their place there.
So the one graph serves every position and prompt, and `greedy` replays it without waiting for a token to reach the host.
Before the first step the kernels run once without a graph, as they are compiled when they are first called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.kernels import llama_step
from tersor.kernels.llama_step import LlamaStep, StepLayer, Weight
from tersor.kernels.quantized_matmul_cuda import prepared_matmul
from tersor.kernels.tiled_weight import N_BLOCK, TiledWeight
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.runtime.engine import check_room
from tersor.runtime.llama import rotary_tables, unlike_family, visible, window_of

MEASURED_STEPS = 9  # of each form of a step, before one is chosen
CHUNK_ROWS = 4096  # prompt tokens, of all sequences, that go through the layers together, which bounds the buffers


def why_not(module: nn.Module) -> str | None:
    """Why this model does not run here, or None."""
    if reason := unlike_family(module):
        return reason
    tensors = [*module.parameters(), *module.buffers()]
    for weight in (each.prepared for each in module.modules() if isinstance(each, QuantizedLinear)):
        tensors += [weight.tiles] if isinstance(weight, TiledWeight) else []
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda" or torch.version.hip is not None:
        return "it is not on one NVIDIA GPU"
    for name, each in module.named_modules():
        if isinstance(each, QuantizedLinear) and not isinstance(each.prepared, TiledWeight):
            return f"{name} has no GPU kernel"
    if not isinstance(module.get_submodule("model.embed_tokens"), nn.Embedding):
        return "its embedding is packed"
    dtypes = {each.weight.dtype for each in module.modules() if isinstance(each, nn.Linear | nn.Embedding)}
    if len(dtypes) != 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        return f"its weights are {', '.join(sorted(str(each).removeprefix('torch.') for each in dtypes))}"
    if torch.cuda.get_device_capability(next(iter(devices))) < (8, 0):
        return "its GPU is of a compute capability below 8.0"
    if module.get_submodule("lm_head").bias is not None:
        return "its head has a bias"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@dataclass(frozen=True)
class Linears:
    """Linear maps of one input, without their biases."""

    weights: tuple[Weight, ...]  # one where they could be joined, else one each
    widths: tuple[int, ...]  # outputs of each map

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """y [rows, width] of each map, rows of any stride. x [rows, in]."""
        y = [_multiply(x, weight) for weight in self.weights]
        return y if len(y) == len(self.widths) else y[0].split_with_sizes(self.widths, dim=1)


def _multiply(x: Tensor, weight: Weight) -> Tensor:
    return torch.mm(x, weight.t()) if isinstance(weight, Tensor) else prepared_matmul(x, weight)


def join(weights: Sequence[Weight]) -> Weight | None:
    """One weight [sum of outputs, in] that gives the outputs of all, one after the other; None where there is none."""
    first = weights[0]
    if isinstance(first, Tensor):
        same = all(isinstance(each, Tensor) and each.dtype == first.dtype for each in weights)
        return torch.cat([each for each in weights if isinstance(each, Tensor)]) if same else None
    packed = [each for each in weights if isinstance(each, TiledWeight)]
    if len(packed) < len(weights) or any(each.out_features % N_BLOCK != 0 for each in packed[:-1]):
        return None
    for each in packed:
        if (each.bits, each.group_size, each.zero) != (first.bits, first.group_size, first.zero):
            return None
        if (each.scale_dtype, each.in_features) != (first.scale_dtype, first.in_features):
            return None
        if (each.order is None) != (first.order is None):
            return None
        if each.order is not None and first.order is not None and not torch.equal(each.order, first.order):
            return None
    tiles = torch.cat([each.tiles for each in packed])
    return replace(first, tiles=tiles, out_features=sum(each.out_features for each in packed))


@dataclass(frozen=True)
class _Layer:
    """The tensors of a layer. Biases are float32."""

    qkv: Linears
    o: Linears
    gate_up: Linears
    down: Linears
    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    keys: Tensor
    values: Tensor
    window: int | None  # positions that a query sees, its own included; None: all


class LlamaGPU:
    """Logits of the tokens that follow, for sequences that start together. `length` positions of the cache are filled.

    module: one for which `why_not` is None. take_over: let the module's own weights go, layer by layer, where they are joined
    to others; it can no longer be called then. Work goes to the stream that is current at every call; do not call two
    engines of one device on two streams at once.
    """

    def __init__(self, module: nn.Module, *, capacity: int, batch: int = 1, take_over: bool = False) -> None:
        from tersor.kernels import decode_triton  # not everywhere installed, and slow to import

        inner: Any = module.model
        config: Any = module.config
        head: Any = module.lm_head
        self._kernels = decode_triton
        self._take_over = take_over
        self.capacity, self.batch, self.length = capacity, batch, 0
        self._embedding: Tensor = inner.embed_tokens.weight.detach()
        self.device = self._embedding.device
        self._early = decode_triton.launches_early(self.device)
        self._eps = float(config.rms_norm_eps)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = int(inner.layers[0].self_attn.head_dim)
        processors = 1
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._splits = decode_triton.splits_for(batch, self._kv_heads, capacity, processors)
        self._layers = [self._layer(each, config) for each in inner.layers]
        self._final_norm = inner.norm.weight.detach()
        self._head = Linears((_weight(head),), (int(head.out_features),))
        cos, sin = rotary_tables(inner, capacity)
        half = self._head_dim // 2  # the second half of a head turns by the same angles
        self._cos, self._sin = (each[:, :half].contiguous().to(self.device) for each in (cos, sin))

        # What a step takes from the one before, so that a graph of it can follow itself.
        self._ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._made = torch.zeros(batch, capacity + 1, dtype=torch.int64, device=self.device)  # by their positions
        self._logits = torch.zeros(batch, int(head.out_features), device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._at_once = self._one_launch() if batch == 1 else None
        self.form = ""  # "one launch" or "kernel by kernel", once a step was done on a GPU
        self.step_seconds: dict[str, float] = {}  # what each took, where both are possible
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the matmul fetches its weight without waiting for who wrote it

    def _one_launch(self, *, profile: bool = False) -> LlamaStep | None:
        """A step's layers in one launch, where there is a kernel for them."""
        if any(len(each.qkv.weights) > 1 or len(each.gate_up.weights) > 1 for each in self._layers):
            return None
        layers = [_step_layer(each) for each in self._layers]
        if llama_step.why_not(layers, self._heads) is not None:
            return None
        return LlamaStep(
            layers, heads=self._heads, eps=self._eps, embedding=self._embedding, id=self._ids, position=self._position,
            cos=self._cos, sin=self._sin, final_norm=self._final_norm.float(), profile=profile,
        )  # fmt: skip

    def _layer(self, layer: Any, config: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_bias, up_bias = _bias(mlp.gate_proj), _bias(mlp.up_proj)
        if gate_bias is None or up_bias is None:
            assert gate_bias is up_bias is None  # the config gives both or none
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        q_norm, k_norm = (None if norm is None else norm.weight.detach() for norm in norms)
        qkv_bias = None
        if any(each.bias is not None for each in projections):
            biases = ((_bias(each), torch.zeros(each.out_features, device=self.device)) for each in projections)
            qkv_bias = torch.cat([zero if bias is None else bias for bias, zero in biases])
        keys, values = torch.zeros(
            2, self.batch, self._kv_heads, self.capacity, self._head_dim,
            dtype=self._embedding.dtype, device=self.device,
        )  # fmt: skip
        return _Layer(
            qkv=self._linears(*projections),
            o=self._linears(attention.o_proj),
            gate_up=self._linears(mlp.gate_proj, mlp.up_proj),
            down=self._linears(mlp.down_proj),
            input_norm=layer.input_layernorm.weight.detach(),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            q_norm=q_norm,
            k_norm=k_norm,
            qkv_bias=qkv_bias,
            o_bias=_bias(attention.o_proj),
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=_bias(mlp.down_proj),
            keys=keys,
            values=values,
            window=window_of(attention, config),
        )

    def _linears(self, *layers: Any) -> Linears:
        weights = tuple(_weight(layer) for layer in layers)
        widths = tuple(int(layer.out_features) for layer in layers)
        joined = join(weights) if len(weights) > 1 else None
        if joined is None:
            return Linears(weights, widths)
        if self._take_over:
            del weights
            for layer in layers:
                _let_go(layer)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what was let go lies in pieces that the joined weights to come do not fit in
        return Linears((joined,), widths)

    def reset(self) -> None:
        """Start new sequences in the same cache."""
        self.rewind(0)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)
        self._position.fill_(self.length)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary], float32, of what follows ids [batch, tokens], which are added to the cache.

        Raises TersorError where they do not fit.
        """
        check_room(self, ids)
        with self._on_device():
            self._add(ids)
            return self._logits.clone()

    @torch.inference_mode()
    def greedy(self, ids: Tensor, new_tokens: int) -> Tensor:
        """The likeliest tokens that follow ids [batch, tokens], one after the other: int64 [batch, new_tokens], on the device.

        The last of them is not in the cache yet. The host waits for none of them. Raises TersorError where they do not fit.
        """
        if new_tokens < 1:
            raise TersorError(f"{new_tokens} new tokens: at least 1 is needed")
        check_room(self, ids, more=new_tokens - 1)
        with self._on_device():
            self._add(ids)
            first = self.length
            for _ in range(new_tokens - 1):
                self._advance()
            return self._made[:, first : first + new_tokens].clone()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _add(self, ids: Tensor) -> None:
        for piece in torch.split(ids.to(self.device), max(1, CHUNK_ROWS // self.batch), dim=1):
            if piece.shape[1] == 1:
                self._ids.copy_(piece[:, 0])
                self._advance()
            else:
                last = self._prefill(piece)
        if piece.shape[1] > 1:
            self._position.fill_(self.length - 1)  # `pick` moves on from the last token
            self._predict(*last)

    def _advance(self) -> None:
        """One step from the tokens and the position that lie on the device."""
        if self._graph is not None:
            self._graph.replay()
            self.length += 1
            return
        if self.device.type == "cuda":
            self._graph = self._fastest_graph()
            self._graph.replay()
        else:
            self._step()
        self.length += 1

    def _fastest_graph(self) -> torch.cuda.CUDAGraph:
        """A step as one launch or kernel by kernel, whichever takes less time on this GPU: which it is depends on the GPU and on
        the weights. A step done twice changes nothing, but for where the next begins, which is put back."""
        forms = [self._step] if self._at_once is None else [self._step_at_once, self._step]
        place = [self._ids, self._position, self._made]
        before = [each.clone() for each in place]

        def put_back() -> None:
            for each, was in zip(place, before, strict=True):
                each.copy_(was)

        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        for form in forms:
            form()  # kernels are compiled when they are first called
            put_back()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=_capture_stream(self.device)):
                form()  # is captured, not run
            graphs["one launch" if form == self._step_at_once else "kernel by kernel"] = graph
        if len(graphs) > 1:
            self.step_seconds = {name: _seconds(graph, put_back) for name, graph in graphs.items()}
        self.form = (
            min(self.step_seconds, key=lambda name: self.step_seconds[name]) if len(graphs) > 1 else next(iter(graphs))
        )
        put_back()
        return graphs[self.form]

    def _step_at_once(self) -> None:
        assert self._at_once is not None
        self._pick(self._at_once())

    def _step(self) -> None:
        kernels = self._kernels

        def attend(layer: _Layer, queries: Tensor) -> Tensor:
            found: Tensor = kernels.attend(
                queries, layer.keys, layer.values, self._position,
                splits=self._splits, window=layer.window or 0, early=self._early,
            )  # fmt: skip
            return found.flatten(1)

        self._predict(*self._through_layers(self._ids, 1, attend))

    def _prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Add several tokens a sequence. The last one's residual stream and what the last layer adds to it, [batch, hidden]."""
        tokens, start = ids.shape[1], self.length
        end = start + tokens
        masks = {window: visible(start, end, window, self.device) for window in {e.window for e in self._layers}}

        def attend(layer: _Layer, queries: Tensor) -> Tensor:
            keys, values, mask = layer.keys[:, :, :end], layer.values[:, :, :end], masks[layer.window]
            group = self._heads // self._kv_heads
            if mask is not None and group > 1:
                # torch's one kernel that takes a mask and keeps no scores in memory wants a key for every query head.
                keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
            y = nn.functional.scaled_dot_product_attention(
                queries.view(self.batch, tokens, self._heads, self._head_dim).transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=mask is None and group > 1,
            )
            return y.transpose(1, 2).flatten(2).flatten(0, 1)

        self._position.fill_(start)
        residual, update = self._through_layers(ids.flatten(), tokens, attend)
        self._position.fill_(end)
        self.length = end
        residual, update = (each.view(self.batch, tokens, -1)[:, -1].contiguous() for each in (residual, update))
        return residual, update

    def _through_layers(
        self, ids: Tensor, tokens: int, attend: Callable[[_Layer, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, float32, and what the last layer adds to it, each [rows, hidden]. ids [rows]: `tokens` of each
        sequence side by side; the first of them belongs at the position."""
        kernels, early, eps = self._kernels, self._early, self._eps
        residual = torch.empty(ids.numel(), self._embedding.shape[1], device=self.device)
        update, bias = self._embedding, None
        for index, layer in enumerate(self._layers):
            normed = kernels.add_norm(
                update, residual, layer.input_norm, eps=eps, ids=ids if index == 0 else None, bias=bias, early=early
            )
            queries = kernels.rope(
                *layer.qkv(normed), layer.keys, layer.values, self._cos, self._sin, self._position,
                tokens=tokens, eps=eps, bias=layer.qkv_bias, q_norm=layer.q_norm, k_norm=layer.k_norm, early=early,
            )  # fmt: skip
            (update,) = layer.o(attend(layer, queries))
            normed = kernels.add_norm(update, residual, layer.mlp_norm, eps=eps, bias=layer.o_bias, early=early)
            gates, ups = layer.gate_up(normed)
            gated = kernels.gate(gates, ups, gate_bias=layer.gate_bias, up_bias=layer.up_bias, early=early)
            (update,) = layer.down(gated)
            bias = layer.down_bias
        return residual, update

    def _predict(self, residual: Tensor, update: Tensor) -> None:
        """Logits and the likeliest token after rows [batch, hidden]; the position moves on."""
        kernels, early = self._kernels, self._early
        bias = self._layers[-1].down_bias
        self._pick(kernels.add_norm(update, residual, self._final_norm, eps=self._eps, bias=bias, early=early))

    def _pick(self, normed: Tensor) -> None:
        (scores,) = self._head(normed)
        self._kernels.pick(scores, self._logits, self._ids, self._made, self._position, early=self._early)


def _seconds(graph: torch.cuda.CUDAGraph, put_back: Callable[[], None]) -> float:
    """The median time of a few replays, each from the same place."""
    times: list[float] = []
    for _ in range(MEASURED_STEPS):
        put_back()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of the device, as cuBLAS keeps a workspace for every stream that it was used on. torch's own stream
    for captures is of the device that captured first."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _weight(layer: Any) -> Weight:
    if isinstance(layer, QuantizedLinear):
        assert isinstance(layer.prepared, TiledWeight)
        return layer.prepared
    weight: Tensor = layer.weight.detach()
    return weight


def _step_layer(layer: _Layer) -> StepLayer:
    q_norm, k_norm = (None if norm is None else norm.float() for norm in (layer.q_norm, layer.k_norm))
    return StepLayer(
        layer.qkv.weights[0], layer.o.weights[0], layer.gate_up.weights[0], layer.down.weights[0],
        layer.input_norm.float(), layer.mlp_norm.float(), q_norm, k_norm,
        layer.qkv_bias, layer.o_bias, layer.gate_bias, layer.up_bias, layer.down_bias,
        layer.keys, layer.values, layer.window,
    )  # fmt: skip


def _bias(layer: Any) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().float()


def _let_go(layer: Any) -> None:
    if isinstance(layer, QuantizedLinear):
        layer.prepared = None
    else:
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
