"""Blocks that go: which, what is left, what the neighbours learn, and results that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tersor
from tersor.methods.structure.block_choice import CHOICES, block_influence, losses_without, macro_influence
from tersor.methods.structure.block_stack import Stack
from tersor.methods.structure.drop_blocks import DropBlocks
from tersor.methods.structure.fused_linear import MODES, FusedLinear
from tersor.methods.structure.fusegpt import LOSSES, FuseGPT, divergence, fold, fuse, group_around

TINY = {"vocab_size": 64, "num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def llama(**other: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "num_key_value_heads": 2, "initializer_range": 0.2, **other})
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=5, n_embd=32, n_head=4, n_positions=64)).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("ln" in name and "weight" in name), std=0.2)
    return model


def qwen3() -> Any:
    """Whose blocks look at everything or at a window, by turns that the config lists."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    config = Qwen3Config(
        **TINY,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=4,
    )
    return Qwen3ForCausalLM(config).eval()


def texts(count: int = 6, length: int = 12) -> list[dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(64, (1, length), generator=chance)} for _ in range(count)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(texts()[0]["input_ids"]).logits
    return found


def compressed(model: Any, method: Any, **other: Any) -> Any:
    return tersor.compress(model, method, **{"calibration": texts(), "format": None, **other})


@pytest.mark.parametrize("build", [llama, gpt2, qwen3])
def test_removed_blocks_are_as_if_skipped_and_transformers_loads_the_rest(build: Any, tmp_path: Path) -> None:
    model = build()
    stack = Stack(model)
    with stack.without(1), stack.without(3):
        expected = logits(model)
    model.save_pretrained(tmp_path / "original")
    method = DropBlocks(choose="1,3")
    result = tersor.compress(tmp_path / "original", method, out=tmp_path / "short")
    assert [each.name.rpartition(".")[2] for each in result.summary.layers] == ["1", "3"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "short", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(logits(tersor.load(tmp_path / "short")), expected)
    with torch.no_grad():
        made = loaded.generate(
            texts()[0]["input_ids"], max_new_tokens=4, do_sample=False
        )  # with a cache of three layers
        for n in range(4):
            assert int(loaded(made[:, : 12 + n]).logits[0, -1].argmax()) == int(made[0, 12 + n])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_fusing_alone_is_removal(build: Any, mode: str) -> None:
    removed = compressed(build(), DropBlocks(blocks=2))
    fused = compressed(build(), FuseGPT(blocks=2, mode=mode, lora_rank=4, epochs=0))
    assert [r.name for r in removed.summary.layers] == [r.name for r in fused.summary.layers]
    torch.testing.assert_close(logits(fused.model), logits(removed.model))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_neighbours_learn_and_the_result_is_a_plain_model(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "original")
    method = FuseGPT(blocks=2, lora_rank=4, epochs=10, base_lr=1e-3, batch_size=3)
    result = tersor.compress(tmp_path / "original", method, calibration=texts(), out=tmp_path / "short")
    for report in result.summary.layers:
        row = report.row()
        assert row["after"] < 0.9 * row["before"]
    loaded, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "short"), tersor.load(tmp_path / "short")
    assert not any(isinstance(module, FusedLinear) for module in ours.modules())
    assert loaded.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(loaded), logits(ours))
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == 3


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_folding_keeps_the_outputs_also_of_maps_that_were_fused_twice(mode: str) -> None:
    stack = Stack(gpt2())
    names = ["attn.c_attn", "mlp.c_proj"]
    chance = torch.Generator().manual_seed(0)
    calls = stack.record(texts())[0]
    for source, into in ((1, 0), (2, 0), (0, 3)):
        plain = stack.run(calls, [into], calls.hidden)
        fuse(stack.blocks[source], stack.blocks[into], names, mode, 4, chance)
        torch.testing.assert_close(stack.run(calls, [into], calls.hidden), plain)  # fusing changes nothing yet
        for name, parameter in stack.blocks[into].named_parameters():
            if "coef" in name or "lora_B" in name:
                parameter.normal_(std=0.1)
        assert not torch.allclose(stack.run(calls, [into], calls.hidden), plain, atol=1e-3)
    for n in (0, 3):
        before = stack.run(calls, [n], calls.hidden)
        fold(stack.blocks[n])
        assert type(stack.blocks[n].get_submodule("attn.c_attn")).__name__ == "Conv1D"
        torch.testing.assert_close(stack.run(calls, [n], calls.hidden), before)


@pytest.mark.parametrize(
    ("fused", "size", "count", "group"),
    [
        (0, 8, 12, range(8)),
        (3, 8, 12, range(8)),  # 2 - 3 < 0
        (4, 8, 12, range(8)),
        (5, 8, 12, range(1, 9)),
        (8, 8, 12, range(4, 12)),
        (9, 8, 12, range(4, 12)),  # 9 + 3 > 11
        (11, 8, 12, range(4, 12)),
        (5, 2, 12, range(4, 6)),
        (0, 2, 12, range(2)),
        (4, 8, 6, range(6)),
        (4, 8, 8, range(8)),
    ],
)
def test_groups_at_both_ends_and_between(fused: int, size: int, count: int, group: range) -> None:
    assert group_around(fused, size, count) == group
    assert fused in group


@torch.no_grad()
def test_scores_are_those_of_their_definitions() -> None:
    model = llama()
    stack = Stack(model)
    recorded = stack.record(texts(2))
    macro, own, losses = (
        macro_influence(stack, recorded),
        block_influence(stack, recorded),
        losses_without(stack, texts(2)),
    )
    states = [model.model(**text, output_hidden_states=True) for text in texts(2)]
    for n in range(4):  # the last of hidden_states is normed
        pairs = [F.cosine_similarity(s.hidden_states[n], s.hidden_states[n + 1], dim=-1).mean() for s in states]
        assert float(own[n]) == pytest.approx(float(sum(pairs)) / 2, rel=1e-5)
    last: list[Tensor] = []
    hook = stack.blocks[-1].register_forward_hook(lambda _m, _i, output: last.append(output))
    for n in range(5):
        found, loss = 0.0, 0.0
        for text in texts(2):
            last.clear()
            model(**text)
            with stack.without(n):
                out = model(**text, labels=text["input_ids"])
            found += float(F.cosine_similarity(last[0], last[1], dim=-1).mean()) / 2
            loss += float(out.loss) / 2
        assert float(macro[n]) == pytest.approx(found, rel=1e-5)
        assert float(losses[n]) == pytest.approx(loss, rel=1e-5)
    hook.remove()


@pytest.mark.parametrize("choose", CHOICES)
def test_a_block_that_does_nothing_goes_first(choose: str) -> None:
    model = llama()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[3].get_submodule(name).weight.zero_()
    result = compressed(model, DropBlocks(blocks=1, choose=choose))
    row = result.summary.layers[0].row()
    assert row["name"] == "model.layers.3"
    assert choose == "perplexity" or row["score"] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(logits(result.model), logits(model))


def test_losses_are_zero_where_nothing_is_lost_and_above_else() -> None:
    target = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for kind in LOSSES:
        assert float(divergence(target, target, kind)) == pytest.approx(0, abs=1e-6)
        assert float(divergence(target, target.flip(0), kind)) > 0.1
    assert float(divergence(target, torch.zeros_like(target), "squared")) == pytest.approx(1)
    expected = F.kl_div(target.flip(0).log_softmax(0), target.softmax(0), reduction="batchmean")
    assert float(divergence(target, target.flip(0), "batch")) == pytest.approx(float(expected), rel=1e-5)


def test_excluded_layers_keep_their_block_and_are_not_fused() -> None:
    method = FuseGPT(blocks=1, epochs=3, lora_rank=4, base_lr=1e-2, batch_size=2)
    result = compressed(llama(), method, exclude=["model.layers.[124].mlp.*"])
    gone = int(result.summary.layers[0].name[-1])
    assert gone in (0, 3)
    before, after = llama().model.layers[1].mlp, result.model.model.layers[0 if gone == 0 else 1].mlp
    assert torch.equal(before.up_proj.weight, after.up_proj.weight)
    with pytest.raises(tersor.TersorError, match="every block that is left has layers"):
        compressed(llama(), DropBlocks(blocks=1), exclude=["*up_proj"])
    with pytest.raises(tersor.TersorError, match="block 2 has layers"):
        compressed(llama(), DropBlocks(choose="2"), exclude=["*2.mlp.up_proj"])


def test_an_encoder_loses_blocks_too() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY)).eval()
    result: Any = compressed(model, DropBlocks(blocks=0.3))
    assert result.model.config.num_hidden_layers == 3
    with pytest.raises(tersor.TersorError, match="perplexity needs a language model, not BertModel"):
        compressed(model, DropBlocks(blocks=1, choose="perplexity"))


def test_from_the_command_line(tersor_command: Any, small: Path, tmp_path: Path) -> None:
    command = ("compress", small, "--out", tmp_path / "out")
    options = ("--method", "fusegpt", "--blocks", "1", "--epochs", "1", "--lora-rank", "4", "--batch-size", "2")
    ran: Ran = tersor_command(*command, *options, "--samples", "4", "--seq-len", "32")
    assert ran.status == 0, ran.err
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 1
    ran = tersor_command(*command, "--method", "drop-blocks", "--choose", "1", "--overwrite")
    assert ran.status == 0, ran.err
    ran = tersor_command(*command, "--method", "drop-blocks", "--blocks", "2", "--overwrite")
    assert (ran.status, ran.err) == (2, "tersor: 2 blocks cannot be removed: the model has 2, and one has to stay\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0.0}, "blocks=0.0 is not allowed"),
        ({"blocks": 1.5}, "blocks=1.5 is not allowed"),
        ({"choose": "least"}, "choose='least' is not allowed"),
        ({"choose": "1,1"}, "choose='1,1' is not allowed"),
        ({"mode": "full"}, "mode='full' is not allowed: one of lora"),
        ({"blocks_per_group": 7}, "blocks_per_group=7 is not allowed: an even number"),
        ({"loss": "mse"}, "loss='mse' is not allowed"),
        ({"loss": "batch", "batch_size": 1}, "loss='batch' is 0 for a batch of one"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tersor.TersorError, match=message):
        FuseGPT(**options)


def test_what_cannot_be_done_is_refused() -> None:
    for method, message in (
        (DropBlocks(choose="1,9"), "the model has blocks 0 to 4, not 9"),
        (DropBlocks(choose="1,2", blocks=3), "names 2 blocks, and blocks=3 asks for 3"),
        (DropBlocks(blocks=5), "5 blocks cannot be removed"),
        (FuseGPT(loss="batch", batch_size=5), "loss='batch' is 0 for a batch of one sample"),  # the sixth sample
    ):
        with pytest.raises(tersor.TersorError, match=message):
            compressed(llama(), method)
    with pytest.raises(tersor.TersorError, match="Sequential has no single stack of equal blocks"):
        compressed(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), DropBlocks(), calibration=[torch.randn(2, 4)])
    with pytest.raises(tersor.TersorError, match="no single stack"):
        compressed(tersor.load("demo-vit"), DropBlocks(choose="1"), calibration=None)
