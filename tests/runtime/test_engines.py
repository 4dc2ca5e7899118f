"""Both engines against transformers' own module: logits, greedy tokens, and the edges of the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import tiny_models
from zoo.tiny_models import logits_of, random_ids

from tersor.compress import RTN, compress
from tersor.errors import TersorError
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.layers.quantized_linear import prepare_layers
from tersor.runtime import cached_module, llama_cpu
from tersor.runtime.cached_module import CachedModule, StaticGrowingLayer
from tersor.runtime.generate import make_engine
from tersor.runtime.llama_cpu import LlamaCPU

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = ("gemma3", "phi3", "opt", "bloom", "gpt2", "gpt_neox", "falcon", "deepseek_v3", "mixtral", "mamba", "jamba")

needs_kernel = pytest.mark.skipif(cpu.choose()[0] is None, reason=cpu.choose()[1])


def assert_same_logits(
    engine: LlamaCPU | CachedModule, expected: Tensor, ids: Tensor, cuts: list[int], tolerance: float
) -> None:
    """The engine, given ids piece by piece, against the logits [batch, tokens, vocabulary] of all at once."""
    start = 0
    for end in (*cuts, ids.shape[1]):
        found = engine.forward(ids[:, start:end])
        torch.testing.assert_close(found, expected[:, end - 1], rtol=0, atol=tolerance)
        start = end
    assert engine.length == ids.shape[1]


@needs_kernel
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_decoder_gives_the_logits_of_the_module(name: str, batch: int) -> None:
    module = tiny_models.build(name)
    assert llama_cpu.why_not(module) is None
    ids = random_ids(batch, 20)
    engine = LlamaCPU(module, capacity=20, batch=batch, exact=True)
    expected = logits_of(module, ids)
    assert_same_logits(engine, expected, ids, [11, 12, 13, 17], 1e-5)
    engine.reset()
    assert_same_logits(engine, expected, ids, [1, 2], 1e-5)  # nothing is left of the text before


@needs_kernel
def test_sliding_windows_norms_biases_and_wide_heads() -> None:
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {**tiny_models.LLAMA, "head_dim": 24, "rms_norm_eps": 1e-3}
    sliding = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
    torch.manual_seed(0)
    models = [
        MistralForCausalLM(MistralConfig(**shape, sliding_window=7)),
        Qwen2ForCausalLM(Qwen2Config(**{**shape, "head_dim": 16}, **sliding)),
    ]
    for module in models:
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)  # biases and norms are no 0 and 1
        ids = random_ids(2, 30)
        engine = LlamaCPU(module.eval(), capacity=30, batch=2, exact=True)
        assert_same_logits(engine, logits_of(module, ids), ids, [3, 20, 21], 1e-4)


@needs_kernel
def test_scaled_rotary_positions() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**tiny_models.LLAMA, rope_parameters=rope, initializer_range=0.1)).eval()
    ids = random_ids(1, 40)
    assert_same_logits(LlamaCPU(module, capacity=40, exact=True), logits_of(module, ids), ids, [35], 1e-5)


@needs_kernel
def test_a_prompt_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpu, "CHUNK", 8)
    module = tiny_models.build("llama")
    for tokens in (16, 17, 20):  # the last chunk is whole, one token, and a part
        ids = random_ids(1, tokens)
        engine = LlamaCPU(module, capacity=tokens, exact=True)
        assert_same_logits(engine, logits_of(module, ids), ids, [], 1e-5)


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_weights(bits: int) -> None:
    module = compress(tiny_models.build("llama"), RTN(bits=bits, group_size=32)).model
    ids = random_ids(2, 20)
    expected = logits_of(module, ids)
    prepare_layers(module)
    scale = float(expected.std())
    assert_same_logits(LlamaCPU(module, capacity=20, batch=2, exact=True), expected, ids, [15, 16], 1e-5 * scale)
    # 16-bit fixed point or bf16: a bf16 rounding of every activation is 2^-9, through some ten matmuls
    assert_same_logits(LlamaCPU(module, capacity=20, batch=2), expected, ids, [15, 16], 0.05 * scale)


@needs_kernel
def test_activations_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of AVX-512 BF16 and AMX, whatever this processor has: the kernels take bf16 everywhere."""
    name = cpu.choose()[0]
    monkeypatch.setattr(llama_cpu, "_BF16", (name,))
    module = tiny_models.build("qwen2")
    ids = random_ids(2, 20)
    expected = logits_of(module, ids)
    assert_same_logits(LlamaCPU(module, capacity=20, batch=2), expected, ids, [15, 16], 0.1 * float(expected.std()))


@needs_kernel
def test_a_bfloat16_model_is_computed_from_its_exact_weights() -> None:
    module = tiny_models.build("llama").bfloat16()
    ids = random_ids(1, 12)
    engine = LlamaCPU(module, capacity=12, exact=True, take_over=True)
    rounded = tiny_models.build("llama").bfloat16().float()
    assert_same_logits(engine, logits_of(rounded, ids), ids, [8], 1e-5)


@needs_kernel
def test_a_full_cache_is_refused_in_one_line() -> None:
    engine = LlamaCPU(tiny_models.build("llama"), capacity=8)
    engine.forward(random_ids(1, 8))
    with pytest.raises(TersorError, match="1 sequences of 9 tokens do not fit in a cache for 1 of 8"):
        engine.forward(random_ids(1, 1))
    with pytest.raises(TersorError, match="do not fit"):
        engine.forward(random_ids(2, 1))


@needs_kernel
def test_what_the_compiled_decoder_leaves_to_the_module() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert "is none of" in str(llama_cpu.why_not(tiny_models.build("gemma3")))
    gelu = LlamaForCausalLM(LlamaConfig(**tiny_models.LLAMA, hidden_act="gelu"))
    assert "gelu" in str(llama_cpu.why_not(gelu))
    hooked = tiny_models.build("llama")
    hooked.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
    assert "model.layers.0 has a hook" in str(llama_cpu.why_not(hooked))
    exchanged = tiny_models.build("llama")
    exchanged.set_submodule("model.layers.0.mlp.up_proj", nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 128)))
    assert "model.layers.0.mlp.up_proj is a Sequential" in str(llama_cpu.why_not(exchanged))
    assert isinstance(make_engine(gelu, capacity=4), CachedModule)
    assert isinstance(make_engine(tiny_models.build("llama"), capacity=4), LlamaCPU)


@pytest.mark.parametrize("name", [*OTHERS, "llama", "gemma2"])
def test_cached_module_goes_on_as_generate_does(name: str) -> None:
    module = tiny_models.build(name)
    module.generation_config.eos_token_id = None
    ids = random_ids(1, 10)
    engine = CachedModule(module, capacity=21)
    token, found = ids, []
    for _ in range(12):
        token = engine.forward(token).argmax(dim=-1, keepdim=True)
        found.append(int(token))
    expected = module.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert found == expected[0, 10:].tolist()
    with pytest.raises(TersorError, match="do not fit"):
        engine.forward(token)


def test_plain_caches_do_not_move_when_they_grow() -> None:
    engine = CachedModule(tiny_models.build("llama"), capacity=12)
    engine.forward(random_ids(1, 6))
    layers = engine._cache.layers
    assert all(type(layer) is StaticGrowingLayer for layer in layers)
    places = [layer.keys.data_ptr() for layer in layers]
    for _ in range(6):
        engine.forward(random_ids(1, 1))
    assert [layer.keys.data_ptr() for layer in layers] == places
    assert layers[0].keys.shape[2] == engine.capacity


def test_models_that_do_not_continue_a_text_are_refused() -> None:
    assert "generates text" in str(cached_module.why_not(tiny_models.build("vit")))
    with pytest.raises(TersorError, match="T5ForConditionalGeneration"):
        make_engine(tiny_models.build("t5"), capacity=4)
