"""A step over a static cache gives the logits of the module's own forward; on a GPU, so does the graph of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import tiny_models
from zoo.tiny_models import logits_of, random_ids

from tersor.compress import RTN, compress
from tersor.kernels.quantized_matmul_cuda import has_kernel
from tersor.layers.quantized_linear import QuantizedLinear, prepare_layers
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.static_step import NotStaticError, PlacedLayer, StaticStep, agree

STATIC = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "bloom", "gpt2", "gpt_neox", "gptj"),
    *("falcon", "stablelm", "olmo2", "starcoder2", "cohere2", "granite", "deepseek_v3", "mixtral", "qwen3_moe"),
    *("gpt_oss", "llama4", "mamba", "mamba2", "jamba"),
)
NOT_STATIC = {  # and why
    "gpt_neo": "does not support a static cache",
    "mpt": "does not support a static cache",
    "falcon_h1": "LinearAttentionAndFullAttentionLayer",
}
CAPACITY = 30
TOLERANCE = 1e-4  # of logits in float32, which are of the size of 1


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    marked: Callable[..., None] = pytest.mark.gpu(skip(test))
    return marked


def build(name: str, **changes: Any) -> nn.Module:
    """As `tiny_models.build`, with other values of the config."""
    tiny = tiny_models.MODELS[name]
    with pytest.MonkeyPatch.context() as patch:
        changed = copy.copy(tiny.config)
        changed.update(changes)
        patch.setitem(tiny_models.MODELS, name, tiny_models.Tiny(tiny.architecture, changed))
        return tiny_models.build(name)


def prompted(module: nn.Module, ids: Tensor) -> CachedModule:
    """An engine that has read ids and holds the cache that the module made."""
    engine = CachedModule(module, capacity=CAPACITY, batch=len(ids))
    engine.why_no_graph = None  # else the cache's layers are exchanged at once
    engine.forward(ids)
    return engine


def static_step(engine: CachedModule) -> StaticStep:
    return StaticStep(engine.module, engine._cache, name=str(engine._name), more=engine._more, capacity=engine.capacity)


def assert_follows(step: StaticStep, expected: Tensor, ids: Tensor, cuts: list[int]) -> None:
    """The step, given ids from the first cut on, against the logits [batch, tokens, vocabulary] of all at once."""
    for start, end in zip(cuts, [*cuts[1:], ids.shape[1]], strict=True):
        torch.testing.assert_close(step.forward(ids[:, start:end]), expected[:, end - 1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", STATIC)
def test_static_steps_give_the_logits_of_the_module(name: str, batch: int) -> None:
    module = tiny_models.build(name)
    ids = random_ids(batch, CAPACITY)
    expected = logits_of(module, ids)
    engine = prompted(module, ids[:, :11])
    step = static_step(engine)
    with torch.inference_mode():
        step.load(engine._cache, 11)
        before = step.layout()
        assert_follows(step, expected, ids, list(range(11, CAPACITY)))  # past all windows, to the last place
        assert step.layout() == before  # a graph would be right as well
        for prompt in (5, 19, 1):  # shorter and longer ones after it
            ids = random_ids(batch, CAPACITY, seed=prompt)
            other = prompted(module, ids[:, :prompt])
            step.load(other._cache, prompt)
            assert_follows(step, logits_of(module, ids), ids, list(range(prompt, CAPACITY)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bloom", "gpt2"])
def test_several_tokens_at_a_time(name: str) -> None:
    module = tiny_models.build(name)
    ids = random_ids(2, CAPACITY)
    engine = prompted(module, ids[:, :9])
    step = static_step(engine)
    with torch.inference_mode():
        step.load(engine._cache, 9)
        assert_follows(step, logits_of(module, ids), ids, [9, 10, 14, 15, 29])


def test_a_window_that_is_longer_and_one_that_is_shorter_than_the_prompt() -> None:
    ids = random_ids(2, CAPACITY)
    for window in (3, 12, 64):
        module = build("mistral", sliding_window=window)
        engine = prompted(module, ids[:, :9])
        step = static_step(engine)
        assert all(isinstance(layer, PlacedLayer) and layer.is_sliding for layer in step._cache.layers)
        with torch.inference_mode():
            step.load(engine._cache, 9)
            assert_follows(step, logits_of(module, ids), ids, list(range(9, CAPACITY)))


def test_falcon_with_alibi() -> None:
    module = build("falcon", alibi=True)
    ids = random_ids(3, CAPACITY)
    engine = prompted(module, ids[:, :9])
    step = static_step(engine)
    with torch.inference_mode():
        step.load(engine._cache, 9)
        assert_follows(step, logits_of(module, ids), ids, list(range(9, CAPACITY)))


@pytest.mark.parametrize("name", NOT_STATIC)
def test_models_that_are_left_as_they_are(name: str) -> None:
    engine = prompted(tiny_models.build(name), random_ids(1, 6))
    with pytest.raises(NotStaticError, match=NOT_STATIC[name]):
        static_step(engine)


def test_hooks_and_other_caches_are_left_as_they_are() -> None:
    module = tiny_models.build("llama")
    engine = prompted(module, random_ids(1, 6))
    hook = module.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
    with pytest.raises(NotStaticError, match="hook"):
        static_step(engine)
    hook.remove()
    engine._cache = object()
    with pytest.raises(NotStaticError, match="object"):
        static_step(engine)


@pytest.mark.parametrize("name", ["llama", "gemma2", "jamba", "mamba", "gpt_neo"])
def test_an_attempt_without_success_changes_nothing(name: str) -> None:
    """Where there is no GPU, the first step fails to be captured after everything has been copied."""
    module = tiny_models.build(name)
    ids = random_ids(2, CAPACITY)
    expected = logits_of(module, ids)
    engine = prompted(module, ids[:, :11])
    for end in range(12, CAPACITY + 1):
        found = engine.forward(ids[:, end - 1 : end])
        torch.testing.assert_close(found, expected[:, end - 1], rtol=0, atol=TOLERANCE)
        if not torch.cuda.is_available():
            assert not engine.graphed
            assert engine.why_no_graph is not None
    assert engine.length == CAPACITY


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_steps_leave_the_cache_that_they_were_loaded_from(name: str) -> None:
    module = tiny_models.build(name)
    ids = random_ids(2, CAPACITY)
    engine = prompted(module, ids[:, :11])
    step = static_step(engine)
    with torch.inference_mode():
        for _ in range(2):
            step.load(engine._cache, 11)
            step.forward(ids[:, 11:12])
            step.forward(ids[:, 12:13])
    torch.testing.assert_close(engine.forward(ids[:, 11:12]), logits_of(module, ids)[:, 11], rtol=0, atol=TOLERANCE)


def test_a_text_that_overflowed_leaves_nothing_to_the_next() -> None:
    module = tiny_models.build("gemma2")
    ids = random_ids(1, CAPACITY)
    engine = prompted(module, ids[:, :11])
    step = static_step(engine)
    with torch.inference_mode():
        for layer in step._cache.layers:
            layer.keys.fill_(float("nan"))
            layer.values.fill_(float("inf"))
        step.load(engine._cache, 11)
        assert_follows(step, logits_of(module, ids), ids, list(range(11, CAPACITY)))


def test_logits_that_differ_by_more_than_rounding_are_told() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) + 50
    assert agree(logits.half(), logits, torch.float16)
    wrong = logits.clone()
    wrong[1] += 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert not agree(wrong, logits, torch.float16)
    assert not agree(wrong.fill_(float("nan")), logits, torch.float16)


def test_on_a_cpu_there_is_no_graph() -> None:
    engine = CachedModule(tiny_models.build("opt"), capacity=8)
    engine.forward(random_ids(1, 4))
    engine.forward(random_ids(1, 1))
    assert not engine.graphed
    assert engine.why_no_graph == "it runs on cpu"


# On a GPU

GRAPHED = (  # others may be, as their experts and the version of transformers have it
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2", "gpt_neox"),
    *("stablelm", "olmo2", "starcoder2", "cohere2", "granite"),
)


def greedy(engine: CachedModule, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens [batch, count], and the logits [count, batch, vocabulary] that they are the likeliest of."""
    engine.reset()
    logits = [engine.forward(ids)]
    for _ in range(count - 1):
        logits.append(engine.forward(logits[-1].argmax(-1, keepdim=True)))
    return torch.stack(logits, 1).argmax(-1), torch.stack(logits)


def assert_graph_is_right(module: nn.Module, batch: int, *, graphed: bool | None) -> None:
    """The graph against the plain path: logits, greedy tokens, and prompts of other lengths."""
    engine = CachedModule(module, capacity=50, batch=batch)
    plain = CachedModule(module, capacity=50, batch=batch)
    plain.why_no_graph = "to compare"
    dtype = next(module.parameters()).dtype
    for prompt in (9, 4, 20, 1):
        ids = random_ids(batch, prompt, seed=prompt)
        (tokens, logits), (expected, others) = greedy(engine, ids, 30), greedy(plain, ids, 30)
        assert all(agree(a, b, dtype) for a, b in zip(logits, others, strict=True))
        assert torch.equal(tokens, expected)
    assert not plain.graphed
    if graphed is not None:
        assert engine.graphed is graphed, engine.why_no_graph
        assert (engine.why_no_graph is None) is graphed


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*STATIC, *NOT_STATIC])
def test_graph_goes_on_as_the_module_does(name: str, batch: int) -> None:
    expected = True if name in GRAPHED else False if name in NOT_STATIC else None
    assert_graph_is_right(tiny_models.build(name).cuda(), batch, graphed=expected)


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3"])
def test_graph_in_float16(name: str) -> None:
    module = tiny_models.build(name).half().cuda()
    ids = random_ids(2, 40).cuda()
    engine = CachedModule(module, capacity=40, batch=2)
    expected = logits_of(module, ids)
    engine.forward(ids[:, :10])
    for end in range(11, 41):  # the same tokens for both, as roundings may make another one the likeliest
        assert agree(engine.forward(ids[:, end - 1 : end]), expected[:, end - 1], torch.float16)
    assert engine.graphed, engine.why_no_graph


@needs_gpu
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma3"])
def test_graph_of_packed_weights(name: str, bits: int) -> None:
    if not has_kernel(torch.device("cuda", 0), torch.float16):
        pytest.skip("needs a GPU of compute capability 8.0 or newer")
    module = compress(tiny_models.build(name), RTN(bits=bits, group_size=32)).model
    module.half().cuda()
    prepare_layers(module)
    assert any(isinstance(each, QuantizedLinear) and each.prepared for each in module.modules())
    engine = CachedModule(module, capacity=40)
    plain = CachedModule(module, capacity=40)
    plain.why_no_graph = "to compare"
    ids = random_ids(1, 40)
    for start, end in ((0, 10), *((n, n + 1) for n in range(10, 40))):
        assert agree(engine.forward(ids[:, start:end]), plain.forward(ids[:, start:end]), torch.float16)
    assert engine.graphed, engine.why_no_graph


class Waits(nn.Module):
    """In the place of a layer: makes the CPU wait for the GPU, in one of two ways."""

    def __init__(self, layer: nn.Module, *, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = layer, reads

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.reads:
            assert y.isfinite().all()
        else:
            torch.cuda.synchronize()
        return y


@needs_gpu
@pytest.mark.parametrize("reads", [True, False])
def test_models_that_wait_for_the_gpu_go_on_as_before(reads: bool) -> None:
    module = tiny_models.build("opt").cuda()
    module.set_submodule(
        "model.decoder.layers.1.fc1", Waits(module.get_submodule("model.decoder.layers.1.fc1"), reads=reads)
    )
    assert_graph_is_right(module, 2, graphed=False)
    assert torch.rand(1, device="cuda") is not None  # the generator is none that is being captured
    assert_graph_is_right(tiny_models.build("opt").cuda(), 2, graphed=True)


@needs_gpu
def test_logits_are_not_overwritten_by_the_next_step() -> None:
    engine = CachedModule(tiny_models.build("opt").cuda(), capacity=20)
    ids = random_ids(1, 20)
    engine.forward(ids[:, :10])
    first = engine.forward(ids[:, 10:11])
    kept = first.clone()
    engine.forward(ids[:, 11:12])
    assert engine.graphed
    assert torch.equal(first, kept)
