"""Paraformer beyond its golden cases: integrate-and-fire, padding, losses, features, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.data.speech_features import Normalization, filterbank, low_frame_rate, mel_triangles
from tersor.errors import TersorError
from tersor.layers.integrate_and_fire import fire_in_steps, integrate_and_fire
from tersor.train.mwer import edit_distance, mwer_loss, sample_paths

SMALL = {
    "input_size": 8,
    "vocab_size": 11,
    "output_size": 16,
    "linear_units": 16,
    "num_blocks": 2,
    "kernel_size": 3,
    "decoder_units": 16,
    "decoder_blocks": 2,
    "att_layer_num": 1,
    "decoder_kernel": 3,
    "dropout": 0.0,
}
ACADEMIC = {"encoder": "conformer", "decoder": "san", "predictor": "v1", "ctc_weight": 0.3}


def build(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("paraformer", **{**SMALL, **config}).double().eval()


def weighted_frames(frames: int = 30) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, frames, 4, dtype=torch.float64), torch.rand(3, frames, dtype=torch.float64)


def test_prefix_sums_fire_as_the_loop_does() -> None:
    hidden, alphas = weighted_frames()
    embeds, peaks = integrate_and_fire(hidden, alphas)
    embeds_loop, peaks_loop, _ = fire_in_steps(hidden, alphas)
    torch.testing.assert_close(embeds, embeds_loop, rtol=0, atol=1e-6)
    torch.testing.assert_close(peaks, peaks_loop, rtol=0, atol=1e-6)


def test_tokens_and_the_unfired_rest_add_up_to_all_frames() -> None:
    hidden, alphas = weighted_frames()
    embeds, _, rest = fire_in_steps(hidden, alphas)
    torch.testing.assert_close(embeds.sum(1) + rest.vector, (alphas[..., None] * hidden).sum(1))
    torch.testing.assert_close(rest.weight, alphas.sum(1) % 1)


def test_firing_over_chunks_equals_firing_at_once() -> None:
    hidden, alphas = weighted_frames()
    whole, _, end = fire_in_steps(hidden, alphas, length=20)
    state, tokens = None, [[], [], []]
    for h, a in zip(hidden.split(7, 1), alphas.split(7, 1), strict=True):
        embeds, peaks, state = fire_in_steps(h, a, state=state)
        for row, count in enumerate((peaks >= 1).sum(1).tolist()):
            tokens[row] += embeds[row, :count]
    for row, found in enumerate(tokens):
        torch.testing.assert_close(torch.stack(found), whole[row, : len(found)], rtol=0, atol=1e-12)
    torch.testing.assert_close(state.vector, end.vector)  # type: ignore[attr-defined]


def test_no_firing_gives_no_tokens() -> None:
    embeds, _ = integrate_and_fire(torch.randn(2, 5, 3), torch.full((2, 5), 0.01))
    assert embeds.shape == (2, 0, 3)
    model = build(tail_threshold=0.0, noise_threshold=1.0)
    assert model.transcribe(torch.randn(1, 9, 8).double(), torch.tensor([9])) == [[]]


@torch.no_grad()
@pytest.mark.parametrize("part", ["sanm", "conformer"])
def test_padding_changes_conformer_only(part: str) -> None:
    model = build(**(ACADEMIC if part == "conformer" else {}))
    speech = torch.randn(1, 20, 8).double()
    alone, mask = model.encode(speech, torch.tensor([20]))
    padded = torch.cat((speech, torch.full((1, 20, 8), 3.0)), 1)
    with_padding, longer = model.encode(padded, torch.tensor([20]))
    assert torch.equal(longer.sum(1) >= mask.sum(1), torch.tensor([True]))
    same = torch.allclose(alone, with_padding[:, : alone.shape[1]], rtol=0, atol=1e-10)
    assert same == (part == "sanm")


@pytest.mark.parametrize("academic", [False, True])
def test_both_recipes_learn_two_sentences(academic: bool) -> None:
    model = build(**(ACADEMIC if academic else {})).train()
    torch.manual_seed(0)
    speech, lengths = torch.randn(2, 40, 8).double(), torch.tensor([40, 33])
    text, text_lengths = torch.tensor([[3, 4, 5], [6, 7, -1]]), torch.tensor([3, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(25):
        losses = model.losses(speech, lengths, text, text_lengths)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        history.append(losses.loss.item())
    assert history[-1] < 0.5 * history[0]


def test_glancing_shows_labels_where_the_first_pass_is_wrong() -> None:
    model = build()
    speech, lengths = torch.randn(1, 30, 8).double(), torch.tensor([30])
    h, mask = model.encode(speech, lengths)
    embeds = torch.randn(1, 4, 16).double()
    guessed = model.decode(embeds, torch.tensor([4]), h, mask).argmax(-1)
    shown = model.glance(embeds, guessed, torch.tensor([4]), h, mask, torch.arange)
    assert torch.equal(shown, embeds)  # all right: nothing to show
    labels = (guessed + 1) % 11
    shown = model.glance(embeds, labels, torch.tensor([4]), h, mask, torch.arange)
    assert torch.equal(shown[:, :3], model.decoder.embed(labels[:, :3]))  # 4 wrong, ratio 0.75
    assert torch.equal(shown[:, 3], embeds[:, 3])


def test_glancing_draws_other_positions_each_time_as_many_and_none_in_the_padding() -> None:
    model, lengths = build(), torch.tensor([4, 2])
    h, mask = model.encode(torch.randn(2, 30, 8).double(), torch.tensor([30, 30]))
    embeds = torch.randn(2, 4, 16).double()
    labels = (model.decode(embeds, lengths, h, mask).argmax(-1) + 1) % 11  # all wrong
    drawn = [
        (model.glance(embeds, labels, lengths, h, mask, None) == model.decoder.embed(labels)).all(-1) for _ in range(20)
    ]
    assert all(shown.sum(1).tolist() == [3, 1] for shown in drawn)  # 0.75 of 4 and of 2
    assert not any(bool(shown[1, 2:].any()) for shown in drawn)
    assert len({tuple(shown.flatten().tolist()) for shown in drawn}) > 1


def test_error_rate_loss_is_zero_for_equal_paths_and_raises_the_better_ones() -> None:
    logits = torch.zeros(1, 2, 6, dtype=torch.float64, requires_grad=True)
    reference, two = torch.tensor([[3, 4]]), torch.tensor([2])
    equal = torch.tensor([[[3, 5], [5, 4]]])  # one error each
    assert mwer_loss(logits.log_softmax(-1), two, reference, two, paths=equal).item() == 0
    better = torch.tensor([[[3, 4], [5, 5]]])  # none, two
    mwer_loss(logits.log_softmax(-1), two, reference, two, paths=better).sum().backward()
    assert (logits.grad[0, [0, 1], [3, 4]] < 0).all()  # a step down the gradient raises them
    assert (logits.grad[0, :, 5] > 0).all()


def test_adding_a_constant_to_all_errors_changes_nothing() -> None:
    log_probs = torch.randn(1, 3, 9).double().log_softmax(-1)
    paths, three = torch.tensor([[[3, 4, 5], [3, 4, 8], [8, 8, 5]]]), torch.tensor([3])
    loss = mwer_loss(log_probs, three, torch.tensor([[3, 4, 5]]), three, paths=paths)
    longer = mwer_loss(log_probs, three, torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([5]), paths=paths)
    torch.testing.assert_close(loss, longer)  # two more errors in each


def test_paths_take_the_best_or_the_second_best_token() -> None:
    log_probs = torch.randn(2, 5, 9)
    paths = sample_paths(log_probs, count=50, generator=torch.Generator().manual_seed(0))
    best = log_probs.topk(2).indices
    assert (paths[..., None] == best[:, None]).any(-1).all()
    assert 0.4 < (paths == best[:, None, :, 0]).float().mean() < 0.6


def test_edit_distance() -> None:
    assert edit_distance([1, 2, 3], [1, 3]) == 1
    assert edit_distance([], [1, 3]) == 2
    assert edit_distance([1, 2, 3, 4], [2, 3, 5, 4]) == 2


def test_a_tone_fills_the_bin_of_its_pitch() -> None:
    tone = 0.3 * torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    frames = filterbank(tone)
    assert frames.shape == (98, 80)
    assert torch.equal(
        frames.argmax(1).unique(), mel_triangles(80, 512, 16_000)[32].argmax()[None]
    )  # bin 32 is 1000 Hz
    with pytest.raises(TersorError, match="at least 400 samples"):
        filterbank(torch.zeros(100))


def test_low_frame_rate_repeats_the_ends() -> None:
    stacked = low_frame_rate(torch.arange(8.0)[:, None])
    assert stacked.tolist() == [[0, 0, 0, 0, 1, 2, 3], [3, 4, 5, 6, 7, 7, 7]]


def test_normalization_file(tmp_path: Path) -> None:
    file = tmp_path / "am.mvn"
    file.write_text(
        "<Nnet>\n<AddShift> 2 2\n<LearnRateCoef> 0 [ -1 2 ]\n<Rescale> 2 2\n<LearnRateCoef> 0 [ 0.5 3 ]\n</Nnet>"
    )
    assert Normalization.read(file)(torch.tensor([[3.0, 1.0]])).tolist() == [[1.0, 9.0]]
    file.write_text("<AddShift> [ 1 2 ]")
    with pytest.raises(TersorError, match="it has 2 and 0"):
        Normalization.read(file)


def test_features_of_another_size_are_refused() -> None:
    with pytest.raises(TersorError, match=r"takes \(batch, frames, 8\), not \[1, 9, 7\]"):
        build()(torch.randn(1, 9, 7), torch.tensor([9]))
    with pytest.raises(TersorError, match="at least 7 frames, not 5"):
        build(**ACADEMIC)(torch.randn(1, 5, 8).double(), torch.tensor([5]))
