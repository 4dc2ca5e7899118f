"""Models of the registry: every causal one generates, by steps or by recomputing, as whole forward passes do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor import models
from tersor.byte_tokenizer import ByteTokenizer
from tersor.compress import RTN, compress
from tersor.errors import TersorError
from tersor.kernels import mamba_cpu
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.models.registry import find, list_models
from tersor.runtime import mamba_token
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.generate import load_module, make_engine, stream, tokens
from tersor.runtime.prepared_linear import PreparedLinear
from tersor.runtime.sampling import Sampling
from tersor.runtime.stepped_module import RecomputedModule, SteppedModule, vocabulary_of
from tersor.train.checkpoint import save_model

SMALL = {info.system: info.small for info in list_models("language-model")}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, small) for name, small in SMALL.items()}
CASES["mamba2"] = ("mamba", {**SMALL["mamba"], "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8}})
CASES["h3 with positions"] = ("h3", {**SMALL["h3"], "max_position_embeddings": 64})


def build(case: str, factor: float = 3, **more: Any) -> nn.Module:
    """A small model with weights `factor` times as large as at first: at 3, tokens differ clearly."""
    torch.manual_seed(0)
    name, options = CASES[case]
    module = models.create(name, **{**options, **more}).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(factor)
    return module


@pytest.mark.parametrize("case", CASES)
def test_greedy_steps_are_those_of_whole_passes(case: str) -> None:
    module = build(case)
    most = vocabulary_of(module)
    assert most is not None
    ids = torch.randint(1, most, (2, 9), generator=torch.Generator().manual_seed(1))
    engine = make_engine(module, capacity=32, batch=2)
    assert type(engine) is (RecomputedModule if case == "h3 with positions" else SteppedModule)
    found, read = engine.forward(ids), ids
    for _ in range(12):
        with torch.inference_mode():
            expected = module(input_ids=read)[:, -1, :most].float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        token = expected.argmax(-1, keepdim=True)
        read = torch.cat([read, token], 1)
        found = engine.forward(token)
    assert engine.length == read.shape[1]


@pytest.mark.parametrize("case", ["mamba", "longvq_lm", "h3 with positions"])
def test_an_engine_goes_back_and_on_with_other_tokens(case: str) -> None:
    module = build(case)
    generator = torch.Generator().manual_seed(2)
    first, other = (torch.randint(1, 30, (1, 8), generator=generator) for _ in range(2))
    engine = make_engine(module, capacity=32)
    engine.forward(first[:, :5])
    for token in first[0, 5:]:
        engine.forward(token.view(1, 1))
    for length in (7, 6, 5, 3, 0):  # one back, into the answer, the prompt's end, into the prompt, all
        engine.rewind(length)
        assert engine.length <= length
        left = engine.length
        read = torch.cat([first[:, :left], other], 1)
        with torch.inference_mode():
            expected = module(input_ids=read)[:, -1, : vocabulary_of(module)]
        torch.testing.assert_close(engine.forward(other), expected, rtol=1e-5, atol=1e-5)
        engine.rewind(left)
        assert engine.length <= left
    steps = make_engine(module, capacity=32)
    steps.forward(first)
    steps.forward(other[:, :1])
    steps.rewind(8)
    assert steps.length == 8  # the prompt's end is kept


@pytest.mark.parametrize("case", ["flashrnn", "gpt2"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_tokens_are_the_same_however_far_ahead_the_device_is(case: str, penalty: float) -> None:
    from zoo import tiny_models

    module = tiny_models.build("gpt2") if case == "gpt2" else build(case)
    ids = torch.tensor([[5, 7, 9]])
    sampling = Sampling(repetition_penalty=penalty)

    def made(ahead: int | None, end: frozenset[int] = frozenset(), most: int = 10) -> list[int]:
        engine = make_engine(module, capacity=3 + most)
        found = list(tokens(engine, ids, max_new_tokens=most, sampling=sampling, end=end, ahead=ahead))
        assert engine.length <= 3 + len(found) + (ahead or 0)
        return found

    expected = made(0)
    assert len(expected) == 10
    assert all(made(ahead) == expected for ahead in (None, 1, 3, 20))
    last = expected[5]
    shorter = expected[: expected.index(last)]
    assert all(made(ahead, frozenset([last])) == shorter for ahead in (0, 1, 3, 20))
    assert made(3, most=2) == expected[:2]


class Overflows:
    """Finite logits, then NaN."""

    device, length = torch.device("cpu"), 0

    def forward(self, ids: Tensor) -> Tensor:
        self.length += 1
        return torch.full((1, 8), float("nan") if self.length > 2 else 0.0)


@pytest.mark.parametrize("ahead", [0, 2])
def test_logits_that_are_not_finite_are_refused_also_ahead(ahead: int) -> None:
    found = tokens(Overflows(), torch.tensor([[1]]), max_new_tokens=5, sampling=Sampling(), ahead=ahead)  # type: ignore[arg-type]
    assert [next(found), next(found)] == [0, 0]
    with pytest.raises(TersorError, match="not finite"):
        next(found)


@pytest.mark.parametrize("case", [case for case in CASES if case != "h3 with positions"])
def test_linear_maps_that_bfloat16_holds_are_exchanged(case: str) -> None:
    """On a CPU with the kernel: the same logits but for the rounding of activations, 2^-9 through some ten products."""
    if cpu.choose()[0] is None:
        pytest.skip(cpu.choose()[1])
    module = build(case, factor=1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    ids = torch.randint(1, vocabulary_of(module) or 0, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = module(input_ids=ids)[:, :, : vocabulary_of(module)]
    linears = sum(type(each) is nn.Linear for each in module.modules())
    engine = SteppedModule(module, capacity=12, take_over=True)
    assert sum(isinstance(each, PreparedLinear) for each in module.modules()) == linears > 0
    assert not any(type(each) is nn.Linear for each in module.modules())
    for found, place in ((engine.forward(ids[:, :9]), 8), (engine.forward(ids[:, 9:10]), 9)):
        error = (found - expected[:, place]).square().mean().sqrt() / expected.std()
        assert error < 0.03


@pytest.mark.skipif(cpu.choose()[0] is None or mamba_cpu.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("packed", "d_state", "bias"), [(True, 16, False), (False, 8, True), (False, 16, False)])
def test_a_token_in_one_call_equals_the_layers(packed: bool, d_state: int, bias: bool) -> None:
    torch.manual_seed(0)
    ssm = {"d_state": d_state, "bias": bias, "conv_bias": not bias}
    module = models.create("mamba", d_model=64, n_layer=3, vocab_size=61, ssm_cfg=ssm).eval().requires_grad_(False)
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear) and not name.endswith("dt_proj"):
            each.weight.copy_(each.weight.bfloat16())  # dt_proj's stay as they are: no packed form holds them
    if packed:
        compress(module, RTN(bits=4, group_size=32), exclude=["*dt_proj"], format=None)
    engine = SteppedModule(module, capacity=20, take_over=True)
    assert mamba_token.why_not(module) is None
    ids = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, state = module.prefill(ids[:, :7])
        engine.forward(ids[:, :7])
        for token in ids[0, 7:]:
            logits, state = module.step(token.view(1), state)
            found = engine.forward(token.view(1, 1))
            assert (found - logits[:, :61]).norm() < (1e-2 if cpu.choose()[0] in cpu.BF16 else 1e-4) * logits.norm()


# ---- from files


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tersor train mamba` leaves: a model of bytes."""
    folder = tmp_path_factory.mktemp("trained") / "mamba"
    folder.mkdir()
    save_model(build("mamba", vocab_size=256), folder, {"tokenizer": "bytes", "seq_len": 32}, ())
    return folder


def test_a_trained_mamba_generates(tersor_command: Callable[..., Ran], trained: Path) -> None:
    ran = tersor_command("generate", trained, "It is", "--max-new-tokens", 8)
    assert ran.status == 0, ran.err
    assert ran.err == ""
    engine = make_engine(load_module(trained), capacity=13)
    ids = ByteTokenizer()("It is")["input_ids"]
    made = list(tokens(engine, ids, max_new_tokens=8, sampling=Sampling()))
    assert ran.out == ByteTokenizer().decode([*ids[0].tolist(), *made]) + "\n"


def test_its_packed_weights_generate(tersor_command: Callable[..., Ran], trained: Path, tmp_path: Path) -> None:
    """In the logits of whole passes of the module that is loaded plainly, but for activations rounded to bfloat16."""
    compress(str(trained), RTN(bits=4, group_size=16), out=tmp_path / "packed", exclude=["*.dt_proj"])
    assert len("".join(stream(tmp_path / "packed", "It is", max_new_tokens=6))) > 0
    module = load_module(tmp_path / "packed")
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = module(input_ids=ids)[:, 6:, :256]
    engine = make_engine(load_module(tmp_path / "packed"), capacity=12, take_over=True)
    found = torch.stack([engine.forward(ids[:, :7]), *(engine.forward(ids[:, n : n + 1]) for n in range(7, 12))], 1)
    assert float((found - wanted).norm() / wanted.norm()) < 0.03
    sizes = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--json")
    ran = tersor_command("bench", tmp_path / "packed", *sizes)
    assert ran.status == 0, ran.err
    assert "SteppedModule" in ran.out


def test_an_official_file_generates_under_its_name(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.create("cot_arithmetic", num_layer=3)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "cot.safetensors")
    given = ("generate", tmp_path / "cot.safetensors", "\x03\x04\x05", "--max-new-tokens", 3, "--as", "cot_arithmetic")
    ran = tersor_command(*given, "--tokenizer", "bytes")
    assert ran.status == 0, ran.err
    assert ran.out.startswith("\x03\x04\x05")
    bare = tersor_command(*given)
    assert (bare.status, bare.err.count("\n")) == (2, 1)
    assert "has no tokenizer, so it cannot read a prompt; name one with --tokenizer" in bare.err
    foreign = tersor_command(
        "generate", tmp_path / "cot.safetensors", "a", "--as", "cot_arithmetic", "--tokenizer", "bytes"
    )
    assert "a token 97, and the model knows 21" in foreign.err


def test_a_model_without_a_state_says_that_it_recomputes(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    save_model(build("h3 with positions", vocab_size=256), tmp_path, {"tokenizer": "bytes", "seq_len": 32}, ())
    ran = tersor_command("generate", tmp_path, "It is", "--max-new-tokens", 4)
    assert ran.status == 0, ran.err
    assert ran.err.endswith("every token is computed from the whole text\n")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linformer_lm", "linformer_lm fills gaps in a text and does not continue it"),
        ("hopfield", "does not continue a text"),
    ],
)
def test_other_tasks_are_refused_in_one_line(
    tersor_command: Callable[..., Ran], tmp_path: Path, name: str, message: str
) -> None:
    info = find(name)
    save_model(models.create(name, **info.small), tmp_path, {}, ())
    ran = tersor_command("generate", tmp_path, "It is", "--tokenizer", "bytes")
    assert ran.status == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("text", ["Grüße", "日本語", "plain"])
def test_bytes_are_read_and_written(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids.tolist() == [list(text.encode())]
    assert tokenizer.decode([*ids[0].tolist(), 300]) == text


def test_cached_modules_go_back() -> None:
    """Plain keys and values are cut, also in their buffers; of other caches nothing is left."""
    from zoo import tiny_models

    for name, kept in (("gpt2", 6), ("gemma3", 0), ("mamba", 0)):
        module = tiny_models.build(name)
        engine = CachedModule(module, capacity=24)
        ids = tiny_models.random_ids(1, 10)
        for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:9]):
            engine.forward(piece)
        engine.rewind(6)
        assert engine.length == kept
        other = tiny_models.random_ids(1, 10, seed=5)
        expected = tiny_models.logits_of(module, torch.cat([ids[:, :kept], other], 1))[:, -1]
        engine.forward(other[:, :8])
        torch.testing.assert_close(engine.forward(other[:, 8:]), expected, rtol=0, atol=1e-4)


def test_generate_takes_its_text_once(tersor_command: Callable[..., Ran], trained: Path) -> None:
    for given in ((), ("a", "--prompt", "b")):
        ran = tersor_command("generate", trained, *given)
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        assert "give the text to continue once" in ran.err
