"""The GPU engine against transformers' own module in float64: logits, greedy tokens, graphs, and the edges of the cache.

One model runs through Triton's interpreter on a CPU, the same step without the graph; the rest needs a GPU.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from kernels.random_weights import random_weight
from kernels.triton_interpreter import run_interpreted
from torch import Tensor, nn
from zoo import tiny_models
from zoo.tiny_models import random_ids

from tersor.compress import RTN, compress
from tersor.errors import TersorError
from tersor.kernels import quantized_matmul_cuda
from tersor.kernels.quantized_matmul_cuda import HOPPER, architecture_of, has_kernel
from tersor.kernels.tiled_weight import prepare, restore
from tersor.layers.quantized_linear import QuantizedLinear, prepare_layers
from tersor.runtime import llama_gpu
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.generate import make_engine
from tersor.runtime.llama_gpu import LlamaGPU, join

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = (torch.float16, torch.bfloat16)
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_kernel = [
    *needs_gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_kernel(torch.device("cuda", 0), torch.float16)),
        reason="needs a GPU of compute capability 8.0 or newer",
    ),
]
needs_hopper = [
    *needs_gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or architecture_of(torch.device("cuda", 0)) != HOPPER,
        reason="needs a GPU of compute capability 9.0 (Hopper)",
    ),
]


def on_gpu(*marks: Any) -> Any:
    def marked(test: Any) -> Any:
        for mark in marks:
            test = mark(test)
        return test

    return marked


def shaken(module: nn.Module) -> nn.Module:
    """Biases and norms that are no 0 and 1, and weights with which attention looks at more than one place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 1.6 * parameter.shape[1] ** -0.5 * noise)
    return module.eval()


def build(
    name: str, dtype: torch.dtype, *, bits: int = 0, group_size: int = 32, sym: bool = True, **config: Any
) -> tuple[nn.Module, nn.Module]:
    """A model on the GPU, and the same numbers in float64 on the CPU."""
    if config:
        import transformers

        tiny = tiny_models.MODELS[name]
        made = getattr(transformers, tiny.architecture)
        module = made(made.config_class(**{**tiny.config, **config}))
    else:
        module = tiny_models.build(name)
    module = shaken(module).to(dtype)
    if bits:
        module = compress(module, RTN(bits=bits, group_size=group_size, sym=sym)).model
    exact = dense_copy(module)
    module = module.cuda()
    prepare_layers(module)
    return module, exact


def dense_copy(module: nn.Module) -> nn.Module:
    """The same numbers in float64, unpacked."""
    exact = copy.deepcopy(module)
    for layer_name, layer in list(exact.named_modules()):
        if isinstance(layer, QuantizedLinear):
            weight = layer.packed.dequantize(torch.float64)
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight = nn.Parameter(weight)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.detach().double())
            exact.set_submodule(layer_name, dense)
    return exact.double()


def logits_of(exact: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = exact(input_ids=ids).logits
    return found


def assert_same_logits(engine: LlamaGPU, expected: Tensor, ids: Tensor, cuts: list[int], dtype: torch.dtype) -> None:
    """The engine, given ids piece by piece, against the logits [batch, tokens, vocabulary] of all at once. Some ten roundings
    a layer add up like random steps: a few times one rounding of the largest logit."""
    start = 0
    for end in (*cuts, ids.shape[1]):
        found = engine.forward(ids[:, start:end])
        assert found.dtype == torch.float32
        assert found.device.type == "cuda"
        tolerance = 16 * ROUNDING[dtype] * float(expected.abs().max())
        torch.testing.assert_close(found.double().cpu(), expected[:, end - 1], rtol=0, atol=tolerance)
        start = end
    assert engine.length == ids.shape[1]


@pytest.mark.slow
def test_interpreted_on_a_cpu() -> None:
    """Prompt, tokens one by one, `greedy` and a second text, for a model with everything: biases, norms, windows."""
    run_interpreted(
        """
        from runtime.test_llama_gpu import check_interpreted
        check_interpreted()
        """
    )


def check_interpreted() -> None:
    import transformers

    shape = {**tiny_models.LLAMA, "num_hidden_layers": 2, "rms_norm_eps": 1e-3}
    sliding = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
    for made, more in (
        (transformers.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        (transformers.Qwen3ForCausalLM, sliding),
        (transformers.MistralForCausalLM, {"sliding_window": 5, "num_key_value_heads": 1}),
        (transformers.LlamaForCausalLM, None),
    ):
        module = shaken(made(made.config_class(**{**shape, **(more or {})})))
        if more is None:  # packed: gate and up can be joined, the narrow q, k and v cannot
            module = compress(module, RTN(bits=4, group_size=32)).model
        ids = random_ids(2, 10)
        expected = logits_of(dense_copy(module), ids)
        for layer in module.modules():
            if isinstance(layer, QuantizedLinear):
                layer.restore()
                layer.prepared = prepare(layer.packed)
        engine = LlamaGPU(module, capacity=10, batch=2, take_over=True)
        counts = [len(linears.weights) for linears in (engine._layers[0].qkv, engine._layers[0].gate_up)]
        assert counts == ([3, 1] if more is None else [1, 1])
        start = 0
        for end in (8, 9, 10):
            found = engine.forward(ids[:, start:end]).double()
            torch.testing.assert_close(found, expected[:, end - 1], rtol=1e-4, atol=1e-4)
            start = end
        engine.reset()
        at_once = engine.greedy(ids[:, :1], 2)
        engine.reset()
        token = ids[:, :1]
        for index in range(2):
            token = engine.forward(token).argmax(dim=-1, keepdim=True)
            assert torch.equal(at_once[:, index : index + 1], token)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_joined_weights_give_the_outputs_side_by_side(symmetric: bool, shuffled: bool) -> None:
    kind = {"bits": 4, "group_size": 64, "symmetric": symmetric, "shuffled": shuffled}
    torch.manual_seed(0)
    weights = [random_weight(outputs, 256, **kind) for outputs in (128, 64, 40)]  # type: ignore[arg-type]
    if shuffled:  # one order, as maps of the same input have
        for weight in weights[1:]:
            object.__setattr__(weight, "g_idx", weights[0].g_idx)
    joined = join([prepare(weight) for weight in weights])
    assert not isinstance(joined, Tensor)
    assert joined is not None
    assert torch.equal(restore(joined).codes(), torch.cat([weight.codes() for weight in weights]))
    assert torch.equal(
        restore(joined).dequantize(torch.float32), torch.cat([weight.dequantize(torch.float32) for weight in weights])
    )


def test_weights_that_do_not_fit_together_are_not_joined() -> None:
    first = prepare(random_weight(64, 256, bits=4, group_size=64, symmetric=True))
    for outputs, kind in (
        (64, {"bits": 8, "group_size": 64, "symmetric": True}),
        (64, {"bits": 4, "group_size": 32, "symmetric": True}),
        (64, {"bits": 4, "group_size": 64, "symmetric": False}),
        (64, {"bits": 4, "group_size": 64, "symmetric": True, "shuffled": True}),
    ):
        assert join([first, prepare(random_weight(outputs, 256, **kind))]) is None  # type: ignore[arg-type]
    narrow = prepare(random_weight(40, 256, bits=4, group_size=64, symmetric=True))
    assert join([narrow, first]) is None
    assert join([first, narrow]) is not None
    assert join([first, torch.zeros(64, 256)]) is None
    assert join([torch.zeros(64, 256), first]) is None
    shuffled = [prepare(random_weight(64, 256, bits=4, group_size=64, shuffled=True)) for _ in range(2)]
    assert join(shuffled) is None  # each has an order of its own


def test_a_model_elsewhere_is_left_to_others() -> None:
    assert "is none of" in str(llama_gpu.why_not(tiny_models.build("gemma3")))
    assert "not on one NVIDIA GPU" in str(llama_gpu.why_not(tiny_models.build("llama")))
    hooked = tiny_models.build("llama")
    hooked.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
    assert "model.layers.0 has a hook" in str(llama_gpu.why_not(hooked))


@on_gpu(*needs_gpu)
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_models_give_the_logits_of_the_module(name: str, dtype: torch.dtype, batch: int) -> None:
    module, exact = build(name, dtype)
    assert llama_gpu.why_not(module) is None
    ids = random_ids(batch, 20)
    engine = LlamaGPU(module, capacity=20, batch=batch)
    assert_same_logits(engine, logits_of(exact, ids), ids, [11, 12, 13, 17], dtype)
    others = random_ids(batch, 20, seed=1)
    expected = logits_of(exact, others)
    for cuts in ([5], [1, 2, 3], [7, 8]):  # nothing is left of the text before, and the graph serves them all
        engine.reset()
        assert_same_logits(engine, expected, others, cuts, dtype)


@on_gpu(*needs_kernel)
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_models_give_the_logits_of_the_module(name: str, dtype: torch.dtype, bits: int) -> None:
    module, exact = build(name, dtype, bits=bits)
    assert llama_gpu.why_not(module) is None
    ids = random_ids(2, 20)
    engine = LlamaGPU(module, capacity=20, batch=2)
    assert_same_logits(engine, logits_of(exact, ids), ids, [15, 16, 17], dtype)


@on_gpu(*needs_kernel)
def test_wide_packed_projections_are_one_matmul() -> None:
    module, exact = build("llama", torch.float16, bits=4, hidden_size=256, head_dim=64, num_attention_heads=4)
    engine = LlamaGPU(module, capacity=20)
    layer = engine._layers[0]
    assert [len(linears.weights) for linears in (layer.qkv, layer.gate_up)] == [1, 1]
    ids = random_ids(1, 20)
    assert_same_logits(engine, logits_of(exact, ids), ids, [15, 16], torch.float16)


@on_gpu(*needs_gpu)
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_sliding_windows_shorter_than_the_text(name: str) -> None:
    sliding = {"sliding_window": 70, "head_dim": 16}
    if name != "mistral":
        sliding |= {"use_sliding_window": True, "max_window_layers": 1}
    module, exact = build(name, torch.float16, **sliding, max_position_embeddings=256)
    ids = random_ids(2, 200)
    engine = LlamaGPU(module, capacity=256, batch=2)
    assert_same_logits(engine, logits_of(exact, ids), ids, [3, 160, 161, 162, 180], torch.float16)


@on_gpu(*needs_gpu)
def test_a_prompt_of_several_chunks_and_scaled_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_gpu, "CHUNK_ROWS", 16)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    module, exact = build("llama", torch.float16, rope_parameters=rope)
    for tokens in (16, 17, 20):  # the last chunk is whole, one token, and a part
        ids = random_ids(2, tokens)
        engine = LlamaGPU(module, capacity=tokens, batch=2)
        assert_same_logits(engine, logits_of(exact, ids), ids, [], torch.float16)


@on_gpu(*needs_gpu)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_makes_the_tokens_of_single_steps(batch: int) -> None:
    module, _ = build("qwen3", torch.bfloat16)
    engine = LlamaGPU(module, capacity=60, batch=batch)
    for seed, prompt in ((0, 9), (1, 1), (2, 20)):
        ids = random_ids(batch, prompt, seed=seed)
        engine.reset()
        at_once = engine.greedy(ids, 40)
        assert engine.length == prompt + 39
        engine.reset()
        token, singly = ids, []
        for _ in range(40):
            token = engine.forward(token).argmax(dim=-1, keepdim=True)
            singly.append(token)
        assert torch.equal(at_once, torch.cat(singly, dim=1))


@on_gpu(*needs_kernel)
def test_early_launches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model large enough for kernels to overlap: the same tokens, bit by bit, with every kernel after the other's end."""
    from tersor.kernels import decode_triton

    if not decode_triton.launches_early(torch.device("cuda", 0)):
        pytest.skip("this Triton has no programmatic dependent launch")
    shape = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    shape |= {"head_dim": 128, "num_hidden_layers": 3, "max_position_embeddings": 512}
    module, _ = build("llama", torch.bfloat16, bits=4, **shape)
    early = LlamaGPU(module, capacity=512, batch=2)
    monkeypatch.setattr(decode_triton, "launches_early", lambda device: False)
    plain = LlamaGPU(module, capacity=512, batch=2)
    ids = random_ids(2, 8)
    expected = plain.greedy(ids, 500)
    last = plain._logits.clone()
    for _ in range(3):
        early.reset()
        assert torch.equal(early.greedy(ids, 500), expected)
        assert torch.equal(early._logits, last)


# Sizes that are no whole number of the kernel's stages, and whose work is no whole number of runs.
ODD = {"hidden_size": 576, "intermediate_size": 832, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
ODD |= {"num_hidden_layers": 3, "max_position_embeddings": 4096}


def one_launch_engine(module: nn.Module, capacity: int) -> LlamaGPU:
    engine = LlamaGPU(module, capacity=capacity)
    assert engine._at_once is not None
    return engine


@on_gpu(*needs_hopper)
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILY)
def test_all_layers_in_one_launch(name: str, dtype: torch.dtype, bits: int) -> None:
    more: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if name == "llama" else {"sliding_window": 20}
    if name.startswith("qwen"):
        more |= {"use_sliding_window": True, "max_window_layers": 1}
    module, exact = build(name, dtype, bits=bits, **ODD, **more)
    engine = one_launch_engine(module, 90)
    for seed in (0, 1):
        ids = random_ids(1, 90, seed=seed)
        engine.reset()
        assert_same_logits(engine, logits_of(exact, ids), ids, [1, 2, 3, 40, 41, 63, 64, 65, 88, 89], dtype)


@on_gpu(*needs_hopper)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_kind_of_weight_in_one_launch(bits: int, group_size: int, sym: bool) -> None:
    shape = {**ODD, "hidden_size": 384, "intermediate_size": 896, "num_hidden_layers": 2}
    for dtype in DTYPES:
        module, exact = build("llama", dtype, bits=bits, group_size=group_size, sym=sym, **shape)
        engine = one_launch_engine(module, 30)
        ids = random_ids(1, 30)
        assert_same_logits(engine, logits_of(exact, ids), ids, [1, 2, 27, 28, 29], dtype)


@on_gpu(*needs_hopper)
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (7, 1), (12, 1), (16, 2)])
@pytest.mark.parametrize("width", [64, 128])
def test_heads_and_long_texts_in_one_launch(heads: tuple[int, int], width: int) -> None:
    shape = {**ODD, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": width}
    shape |= {"hidden_size": 64 * heads[0] if 320 % heads[0] else 320, "num_hidden_layers": 1}
    module, exact = build("llama", torch.float16, **shape)
    engine = one_launch_engine(module, 2600)
    ids = random_ids(1, 2600)
    expected = logits_of(exact, ids)
    for start in (1, 60, 127, 1020, 2590):  # a piece of the positions is full, the next begins
        engine.reset()
        cuts = list(range(start, start + 10))
        assert_same_logits(engine, expected[:, : start + 10], ids[:, : start + 10], cuts, torch.float16)


@on_gpu(*needs_hopper)
@pytest.mark.parametrize("bits", [0, 4])
def test_one_launch_is_reproducible_and_agrees_with_the_kernels_one_by_one(bits: int) -> None:
    """At a size at which every multiprocessor has work in every matmul and runs ahead of others."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    shape |= {"head_dim": 64, "num_hidden_layers": 8, "max_position_embeddings": 1024}
    module, _ = build("llama", torch.bfloat16, bits=bits, group_size=128, **shape)
    engine, one_by_one = one_launch_engine(module, 1024), LlamaGPU(module, capacity=1024)
    one_by_one._at_once = None
    ids = random_ids(1, 8)
    tokens = engine.greedy(ids, 900)
    last = engine._logits.clone()
    for _ in range(3):
        engine.reset()
        assert torch.equal(engine.greedy(ids, 900), tokens)
        assert torch.equal(engine._logits, last)
    engine.reset()
    for token in torch.cat([ids.cuda(), tokens], dim=1).split(1, dim=1)[:400]:
        found, expected = engine.forward(token), one_by_one.forward(token)
        torch.testing.assert_close(found, expected, rtol=0, atol=32 * 2**-8 * float(expected.abs().max()))


@on_gpu(*needs_kernel)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_models_on_gpus_that_are_not_hopper(batch: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for compute capability 8.0, which newer GPUs run too."""
    monkeypatch.setattr(quantized_matmul_cuda, "architecture_of", lambda device: "compute_80")
    dtype = DTYPES[batch % 2]
    module, exact = build("llama", dtype, bits=bits, group_size=64, **ODD)
    engine = LlamaGPU(module, capacity=130, batch=batch)
    assert engine._at_once is None
    ids = random_ids(batch, 130)
    expected = logits_of(exact, ids)
    for cuts in ([1, 2, 3, 100, 129], [70, 71, 72]):
        engine.reset()
        assert_same_logits(engine, expected, ids, cuts, dtype)
    assert engine.form == "kernel by kernel"


@on_gpu(*needs_kernel)
def test_models_that_go_kernel_by_kernel() -> None:
    narrow, _ = build("llama", torch.float16)
    assert LlamaGPU(narrow, capacity=8)._at_once is None
    wide, _ = build("llama", torch.float16, **ODD)
    assert LlamaGPU(wide, capacity=8, batch=2)._at_once is None
    mixed = compress(copy.deepcopy(wide), RTN(bits=4, group_size=32)).model
    other = compress(wide, RTN(bits=8, group_size=32)).model.get_submodule("model.layers.1.mlp.down_proj")
    mixed.set_submodule("model.layers.1.mlp.down_proj", other)
    exact = dense_copy(mixed)
    prepare_layers(mixed)
    engine = LlamaGPU(mixed, capacity=20)
    assert engine._at_once is None
    ids = random_ids(1, 20)
    assert_same_logits(engine, logits_of(exact.cpu(), ids), ids, [15, 16], torch.float16)


@on_gpu(*needs_gpu)
def test_a_full_cache_is_refused_in_one_line() -> None:
    module, _ = build("llama", torch.float16)
    engine = LlamaGPU(module, capacity=8)
    engine.forward(random_ids(1, 8))
    with pytest.raises(TersorError, match="1 sequences of 9 tokens do not fit in a cache for 1 of 8"):
        engine.forward(random_ids(1, 1))
    with pytest.raises(TersorError, match="do not fit"):
        engine.forward(random_ids(2, 1))
    engine.reset()
    with pytest.raises(TersorError, match="1 sequences of 9 tokens do not fit"):
        engine.greedy(random_ids(1, 4), 6)
    assert engine.greedy(random_ids(1, 4), 5).shape == (1, 5)
    with pytest.raises(TersorError, match="0 new tokens"):
        engine.greedy(random_ids(1, 4), 0)


@on_gpu(*needs_gpu)
def test_taking_over_does_not_double_the_memory() -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    shape |= {"head_dim": 128, "num_hidden_layers": 4}
    module, exact = build("llama", torch.float16, **shape)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = LlamaGPU(module, capacity=16, take_over=True)
    layer_bytes = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert torch.cuda.max_memory_allocated() < before + 1.5 * layer_bytes
    assert torch.cuda.max_memory_reserved() < 1.5 * before
    ids = random_ids(1, 12)
    assert_same_logits(engine, logits_of(exact, ids), ids, [10], torch.float16)


@on_gpu(*needs_gpu)
def test_which_models_of_a_gpu_run_here() -> None:
    module, _ = build("llama", torch.bfloat16)
    assert isinstance(make_engine(module, capacity=4), LlamaGPU)
    assert "float32" in str(llama_gpu.why_not(tiny_models.build("llama").cuda()))
    packed = compress(tiny_models.build("llama").half(), RTN(bits=4, group_size=32)).model.cuda()  # not prepared
    assert "q_proj has no GPU kernel" in str(llama_gpu.why_not(packed))
    engine = make_engine(packed, capacity=4)
    assert isinstance(engine, CachedModule)
    assert engine.forward(random_ids(1, 3)).shape == (1, tiny_models.VOCABULARY)
