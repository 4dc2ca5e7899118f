"""Strings of spoken digits: Paraformer beside a decoder that writes one token after another.

    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/speech.py

Strings of 1 to 6 digits are joined from recordings of single digits (three people, 8 kHz), with pauses of 0.05 to 0.3 seconds.
"official": takes 0 to 4 of each person are for testing; "new voice": theo is heard in testing only. Both models have the same
encoder (SANM, width 144, 4 blocks) and learn from the same strings for the same number of steps; the peer's decoder is PyTorch's
TransformerDecoder with about as many weights as Paraformer's, decoded greedily with what it has written so far.

Errors: insertions, deletions and replacements per hundred digits, over 300 strings (the 95 % interval is about +-2 points
at 10 %). Count: strings whose number of digits is right. Real-time factor: seconds of computing for a second of speech, one
string at a time, features included, one thread, both in turn. 8 and 4 bits: GPTQ of the linear layers, one scale for each
output, calibrated on 64 of the training strings.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import DATA, machine, write_table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
import tersor.models
from tersor.data.speech import read_audio
from tersor.data.speech_features import Normalization
from tersor.methods.weights.gptq import GPTQ
from tersor.models.speech.paraformer_parts import padding_mask
from tersor.tasks.transcribe import FrontEnd, Recordings
from tersor.train.mwer import edit_distance

RATE, WIDTH, BLOCKS, START, END, FIRST = 8000, 144, 4, 1, 2, 3  # digit d is token FIRST + d
VOCABULARY = FIRST + 10
MODEL = {
    "input_size": 280,
    "vocab_size": VOCABULARY,
    "output_size": WIDTH,
    "linear_units": 3 * WIDTH,
    "num_blocks": BLOCKS,
    "kernel_size": 7,
    "decoder_units": 3 * WIDTH,
    "decoder_blocks": 3,
    "att_layer_num": 3,
    "decoder_kernel": 5,
    "sampling_ratio": 0.4,
    "lsm_weight": 0.05,
}


@dataclass(frozen=True)
class Digit:
    speaker: str
    digit: int
    take: int
    sound: Tensor


def read_digits() -> list[Digit]:
    folder = DATA / "speech"
    with (folder / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        Digit(r["speaker"], int(r["digit"]), int(r["take"]), read_audio(folder / "recordings" / r["file"], RATE))
        for r in rows
    ]


def strings(digits: list[Digit], count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(sound, tokens) of strings that one person speaks."""
    chance = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(0, most, (), generator=chance))

    found = []
    people = sorted({each.speaker for each in digits})
    of = {person: [each for each in digits if each.speaker == person] for person in people}
    for _ in range(count):
        own = of[people[draw(len(people))]]
        chosen = [own[draw(len(own))] for _ in range(1 + draw(6))]
        parts = [torch.zeros(400 + draw(2000))]
        for each in chosen:
            parts += [each.sound, torch.zeros(400 + draw(2000))]
        sound = torch.cat(parts)
        noise = 1e-3 * torch.randn(sound.shape, generator=chance)
        found.append((sound + noise, torch.tensor([FIRST + each.digit for each in chosen])))
    return found


class WriterDecoder(nn.Module):
    """The peer: Paraformer's encoder, and PyTorch's decoder that writes one token after another."""

    def __init__(self) -> None:
        super().__init__()
        own: Any = tersor.models.create("paraformer", **MODEL)
        self.encoder = own.encoder
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 3 * WIDTH, 0.1, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 3, nn.LayerNorm(WIDTH))
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def encode(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        h: Tensor
        h, mask = self.encoder(speech, padding_mask(lengths, speech.shape[1]))
        return h, mask

    def decode(self, tokens: Tensor, h: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places.weight[: tokens.shape[1]]
        ahead = torch.triu(torch.full((tokens.shape[1],) * 2, -math.inf), 1)
        logits: Tensor = self.out(self.decoder(x, h, tgt_mask=ahead, memory_key_padding_mask=~mask.bool()))
        return logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        text = F.pad(batch["text"], (0, 1), value=-1).scatter(1, batch["text_lengths"][:, None], END)
        tokens = torch.cat((torch.full_like(text[:, :1], START), text[:, :-1].clamp(min=0)), 1)
        logits = self.decode(tokens, *self.encode(batch["speech"], batch["speech_lengths"]))
        return F.cross_entropy(logits.flatten(0, 1), text.flatten(), ignore_index=-1, label_smoothing=0.05)

    @torch.no_grad()
    def transcribe(self, speech: Tensor, lengths: Tensor) -> list[list[int]]:
        h, mask = self.encode(speech, lengths)
        tokens = torch.full((1, 1), START)
        for _ in range(12):
            following = self.decode(tokens, h, mask)[:, -1:].argmax(-1)
            if int(following) == END:
                break
            tokens = torch.cat((tokens, following), 1)
        return [tokens[0, 1:].tolist()]


def learn(model: Any, data: list[dict[str, Tensor]], steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        batch = Recordings.collate([data[int(n)] for n in torch.randint(len(data), (16,))])
        hide = torch.rand(batch["speech"].shape[:2]) < 0.08  # frames hidden at random, alike for both models
        batch["speech"] = batch["speech"].masked_fill(hide[..., None], 0)
        loss = model.loss(batch) if isinstance(model, WriterDecoder) else model.losses(**batch).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    model.eval()


def scores(model: Any, front: FrontEnd, tests: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    wrong = total = counted = 0
    for sound, tokens in tests:
        speech = front(sound)[None]
        (said,) = model.transcribe(speech, torch.tensor([speech.shape[1]]))
        wrong += edit_distance(said, tokens.tolist())
        counted += len(said) == len(tokens)
        total += len(tokens)
    return 100 * wrong / total, 100 * counted / len(tests)


def real_time(models: dict[str, Any], front: FrontEnd, tests: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    spent = dict.fromkeys(models, 0.0)
    for turn in range(2):
        for sound, _ in tests[:60]:
            for name, model in models.items():
                started = time.process_time()
                speech = front(sound)[None]
                model.transcribe(speech, torch.tensor([speech.shape[1]]))
                spent[name] += (time.process_time() - started) * turn  # the first turn warms up
    seconds = sum(len(sound) for sound, _ in tests[:60]) / RATE
    return {name: each / seconds for name, each in spent.items()}


def quantized(model: Any, bits: int, data: list[dict[str, Tensor]]) -> Any:
    calibration = [{key: each[key][None] for key in ("speech", "speech_lengths")} for each in data[:64]]
    return tersor.compress(model, GPTQ(bits=bits, group_size=-1), calibration=calibration).model


def weights(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--strings", type=int, default=3000)
    parser.add_argument("--tests", type=int, default=300)
    asked = parser.parse_args()
    torch.set_flush_denormal(True)
    every = read_digits()
    splits = {
        "official": ([d for d in every if d.take > 4], [d for d in every if d.take <= 4]),
        "new voice": ([d for d in every if d.speaker != "theo"], [d for d in every if d.speaker == "theo"]),
    }
    lines = ["| split | model | weights, million | errors % | count right % | real-time factor |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for split, (of_training, of_testing) in splits.items():
        training, tests = strings(of_training, asked.strings, 0), strings(of_testing, asked.tests, 1)
        plain = FrontEnd(RATE, 40, 7, 6)
        features = [plain(sound) for sound, _ in training]
        every_frame = torch.cat(features)
        front = FrontEnd(RATE, 40, 7, 6, Normalization(-every_frame.mean(0), 1 / every_frame.std(0)))
        assert front.normalize is not None
        data = [
            {
                "speech": front.normalize(feature),
                "speech_lengths": torch.tensor(len(feature)),
                "text": tokens,
                "text_lengths": torch.tensor(len(tokens)),
            }
            for feature, (_, tokens) in zip(features, training, strict=True)
        ]
        torch.manual_seed(0)
        ours: Any = tersor.models.create("paraformer", **MODEL)
        models: dict[str, Any] = {"Paraformer": ours, "one token after another": WriterDecoder()}
        for model in models.values():
            learn(model, data, asked.steps, seed=1)
        speed = real_time(models, front, tests)
        for bits in (8, 4):
            models[f"Paraformer, {bits} bits"] = quantized(ours, bits, data)
        for name, model in models.items():
            wrong, counted = scores(model, front, tests)
            size = f"{weights(model) / 1e6:.2f}" if name in speed else ""
            pace = f"{speed[name]:.4f}" if name in speed else ""
            lines.append(f"| {split} | {name} | {size} | {wrong:.1f} | {counted:.0f} | {pace} |")
            print(lines[-1], flush=True)
    described = (__doc__ or "").strip()
    text = [
        "# Strings of spoken digits",
        "",
        described[described.index("Strings of 1") :],
        "",
        *lines,
        "",
        machine(),
        "",
    ]
    write_table(
        "speech", "\n".join([*text, f"`OMP_NUM_THREADS=1 python benchmarks/speech.py --steps {asked.steps}`", ""])
    )


if __name__ == "__main__":
    main()
