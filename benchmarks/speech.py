"""Strings of spoken digits: Paraformer beside a decoder that writes one token after another.

    export TERSOR_DATA=../shared/data
    python benchmarks/speech.py --device cuda --weights speech --split official        learns, and keeps speech/official.pt
    python benchmarks/speech.py --device cuda --weights speech --split "new voice"
    OMP_NUM_THREADS=1 python benchmarks/speech.py --weights speech                     measures both, and keeps the table

Strings of 1 to 6 digits are joined from recordings of single digits (three people, 8 kHz), with pauses of 0.05 to 0.3 seconds.
"official": takes 0 to 4 of each person are for testing; "new voice": theo is heard in testing only. Both models have the same
encoder (SANM, width 144, 4 blocks) and learn from the same batches, side by side; the peer's decoder is PyTorch's
TransformerDecoder with about as many weights as Paraformer's, decoded greedily with what it has written so far.

Errors: insertions, deletions and replacements per hundred digits, over 300 strings (the 95 % interval is about +-2 points at 10
%). Count: strings whose number of digits is right. Real-time factor: seconds of computing for a second of speech, one string at
a time, both in turn, of a processor's time, one thread, so that other work on the machine counts less; in brackets with the
features, which are the same for both. Decoder: the same of what follows the encoder (predictor and decoder, or the decoder's
steps). In 8 to 2 bits: GPTQ of the linear layers of the encoder, or of the decoder's blocks too, one scale for each output,
calibrated on 64 of the training strings. MWER: Paraformer learns 300 steps more, at a quarter of the rate, with the minimum
word error rate loss of four paths added; "longer": the same steps without it. Learned on an H200 that was shared.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DATA, learn, machine, write_table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
import tersor.models
from tersor.data.speech import read_audio
from tersor.data.speech_features import Normalization
from tersor.methods.weights.gptq import GPTQ
from tersor.models.speech.paraformer_parts import padding_mask
from tersor.tasks.transcribe import FrontEnd
from tersor.train.mwer import edit_distance, mwer_loss, sample_paths

RATE, WIDTH, BLOCKS, START, END, FIRST = 8000, 144, 4, 1, 2, 3  # digit d is token FIRST + d
BATCH, RATE_OF_LEARNING, MORE_STEPS = 64, 2e-3, 300
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
        ahead = torch.triu(torch.full((tokens.shape[1],) * 2, -math.inf, device=h.device), 1)
        logits: Tensor = self.out(
            self.decoder(x, h, tgt_mask=ahead, tgt_is_causal=True, memory_key_padding_mask=~mask.bool())
        )
        return logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        text = F.pad(batch["text"], (0, 1), value=-1).scatter(1, batch["text_lengths"][:, None], END)
        tokens = torch.cat((torch.full_like(text[:, :1], START), text[:, :-1].clamp(min=0)), 1)
        logits = self.decode(tokens, *self.encode(batch["speech"], batch["speech_lengths"]))
        return F.cross_entropy(logits.flatten(0, 1), text.flatten(), ignore_index=-1, label_smoothing=0.05)

    @torch.no_grad()
    def transcribe(self, speech: Tensor, lengths: Tensor) -> list[list[int]]:
        h, mask = self.encode(speech, lengths)
        return self.write(h, mask)

    def write(self, h: Tensor, mask: Tensor) -> list[list[int]]:
        tokens = torch.full((len(h), 1), START, device=h.device)
        for _ in range(12):
            tokens = torch.cat((tokens, self.decode(tokens, h, mask)[:, -1:].argmax(-1)), 1)
            if bool((tokens == END).any(1).all()):
                break
        rows = tokens[:, 1:].tolist()
        return [row[: row.index(END)] if END in row else row for row in rows]


@dataclass(frozen=True)
class Strings:
    """Features (N, T, 280), filled up with zeros, and tokens (N, 6), filled up with -1."""

    speech: Tensor
    speech_lengths: Tensor
    text: Tensor
    text_lengths: Tensor

    def batch(self, rows: Tensor, device: str) -> dict[str, Tensor]:
        longest = int(self.speech_lengths[rows].max())
        found = {
            "speech": self.speech[rows.to(self.speech.device), :longest].float(),
            "speech_lengths": self.speech_lengths[rows],
            "text": self.text[rows, : int(self.text_lengths[rows].max())],
            "text_lengths": self.text_lengths[rows],
        }
        return {name: value.to(device) for name, value in found.items()}


def features_of(sounds: list[tuple[Tensor, Tensor]], front: FrontEnd) -> Strings:
    features = [front(sound) for sound, _ in sounds]
    padded = nn.utils.rnn.pad_sequence
    return Strings(
        padded(features, batch_first=True),
        torch.tensor([len(each) for each in features]),
        padded([tokens for _, tokens in sounds], batch_first=True, padding_value=-1),
        torch.tensor([len(tokens) for _, tokens in sounds]),
    )


def models_of(seed: int) -> tuple[Any, WriterDecoder]:
    torch.manual_seed(seed)
    ours: Any = tersor.models.create("paraformer", **MODEL)
    return ours, WriterDecoder()


def learn_both(ours: Any, peer: WriterDecoder, data: Strings, *, device: str, seconds: float, steps: int) -> int:
    draw = batches(data, device)

    def loss() -> Tensor:
        batch = draw()
        total: Tensor = ours.losses(**batch).loss + peer.loss(batch)
        return total

    models = [ours.to(device), peer.to(device)]
    return learn(models, loss, rate=RATE_OF_LEARNING, seconds=seconds, steps=steps, clip=5.0, told="speech")


def learn_on(ours: Any, data: Strings, *, device: str, mwer: bool, steps: int) -> Any:
    """A copy of the model that learned more, with the MWER loss or without."""
    model, draw = copy.deepcopy(ours).to(device), batches(data, device)

    def loss() -> Tensor:
        batch = draw()
        found = model.losses(**batch)
        total: Tensor = found.loss
        if mwer:
            log_probs, lengths = found.logits.log_softmax(-1), batch["text_lengths"]
            paths = sample_paths(log_probs)
            total = total + mwer_loss(log_probs, lengths, batch["text"], lengths, paths=paths).mean()
        return total

    told = "MWER" if mwer else "longer"
    learn([model], loss, rate=RATE_OF_LEARNING / 4, seconds=math.inf, steps=steps, clip=5.0, told=told)
    return model


def batches(data: Strings, device: str) -> Callable[[], dict[str, Tensor]]:
    torch.manual_seed(1)
    data = Strings(
        *(each.to(device) for each in (data.speech.half(), data.speech_lengths, data.text, data.text_lengths))
    )

    def draw() -> dict[str, Tensor]:
        rows = torch.randint(len(data.text), (BATCH,), device=device)
        speech = data.speech[rows].float()
        hide = torch.rand(speech.shape[:2], device=device) < 0.08  # frames hidden at random, alike for all models
        return {
            "speech": speech.masked_fill(hide[..., None], 0),
            "speech_lengths": data.speech_lengths[rows],
            "text": data.text[rows],
            "text_lengths": data.text_lengths[rows],
        }

    return draw


@torch.no_grad()
def scores(model: Any, tests: Strings) -> tuple[float, float]:
    """Errors and right counts, per cent."""
    wrong = counted = 0
    for rows in torch.arange(len(tests.text)).split(50):
        batch = tests.batch(rows, "cpu")
        said = model.transcribe(batch["speech"], batch["speech_lengths"])
        for found, tokens, count in zip(said, batch["text"].tolist(), batch["text_lengths"].tolist(), strict=True):
            wrong += edit_distance(found, tokens[:count])
            counted += len(found) == count
    return 100 * wrong / int(tests.text_lengths.sum()), 100 * counted / len(tests.text)


@torch.no_grad()
def real_time(ours: Any, peer: WriterDecoder, front: FrontEnd, tests: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Seconds a second of speech, of the processor: of features, encoder, and what follows."""
    spent = {"ours": torch.zeros(3), "peer": torch.zeros(3)}
    models: dict[str, Any] = {"ours": ours, "peer": peer}
    for turn in range(2):
        for sound, _ in tests:
            for name, model in models.items():
                times = [time.process_time()]
                speech = front(sound)[None]
                lengths = torch.tensor([speech.shape[1]])
                times.append(time.process_time())
                h, mask = model.encode(speech, lengths)
                times.append(time.process_time())
                if model is ours:
                    predicted = ours.predictor(h, mask)
                    ours.decode(predicted.embeds, predicted.token_num.long(), h, mask).argmax(-1).tolist()
                else:
                    peer.write(h, mask)
                times.append(time.process_time())
                spent[name] += torch.tensor(times).diff() * turn  # the first turn warms up
    return {name: each / (sum(len(sound) for sound, _ in tests) / RATE) for name, each in spent.items()}


def quantized(model: Any, bits: int, data: Strings, include: list[str]) -> Any:
    calibration = [
        {"speech": data.speech[row : row + 1, : int(length)].float(), "speech_lengths": length[None]}
        for row, length in enumerate(data.speech_lengths[:64])
    ]
    return tersor.compress(model, GPTQ(bits=bits, group_size=-1), calibration=calibration, include=include).model


def weights(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def learned(
    split: str, people: list[Digit], asked: argparse.Namespace
) -> tuple[dict[str, Any], FrontEnd, Strings, int]:
    """From the file of an earlier run, or learned now and kept there."""
    file = asked.weights / f"{split.replace(' ', '-')}.pt"
    kept = torch.load(file) if file.exists() else None
    plain = FrontEnd(RATE, 40, 7, 6)
    data = features_of(strings(people, 64 if kept else asked.strings, 0), plain)
    ours, peer = models_of(0)
    if kept is None:
        every = torch.cat([row[:length] for row, length in zip(data.speech, data.speech_lengths.tolist(), strict=True)])
        kept = {"shift": -every.mean(0), "scale": 1 / every.std(0)}
    front = FrontEnd(RATE, 40, 7, 6, Normalization(kept["shift"], kept["scale"]))
    assert front.normalize is not None
    inside = torch.arange(data.speech.shape[1]) < data.speech_lengths[:, None]
    data = Strings(front.normalize(data.speech) * inside[..., None], data.speech_lengths, data.text, data.text_lengths)
    models: dict[str, Any] = {"ours": ours, "peer": peer, "longer": copy.deepcopy(ours), "MWER": copy.deepcopy(ours)}
    if "steps" not in kept:
        kept["steps"] = learn_both(ours, peer, data, device=asked.device, seconds=asked.seconds, steps=asked.steps)
        for name in ("longer", "MWER"):
            steps = min(asked.steps, MORE_STEPS)
            models[name] = learn_on(ours, data, device=asked.device, mwer=name == "MWER", steps=steps)
        for name, model in models.items():
            kept[name] = {key: value.half() for key, value in model.cpu().state_dict().items()}
        asked.weights.mkdir(parents=True, exist_ok=True)
        torch.save(kept, file)
    for name, model in models.items():
        model.load_state_dict(kept[name])
        model.eval()
    return models, front, data, kept["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of learned weights")
    parser.add_argument("--split", choices=("official", "new voice"), help="of one split alone; no table is kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of learning, at most")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--strings", type=int, default=3000)
    parser.add_argument("--tests", type=int, default=300)
    asked = parser.parse_args()
    torch.set_flush_denormal(True)
    every = read_digits()
    splits = {
        "official": ([d for d in every if d.take > 4], [d for d in every if d.take <= 4]),
        "new voice": ([d for d in every if d.speaker != "theo"], [d for d in every if d.speaker == "theo"]),
    }
    lines = ["| split | model | steps | weights, million | errors % | count right % | real-time factor | decoder |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for split, (of_training, of_testing) in splits.items():
        if asked.split not in (None, split):
            continue
        own, front, data, steps = learned(split, of_training, asked)
        ours, peer = own["ours"], own["peer"]
        sounds = strings(of_testing, asked.tests, 1)
        tests = features_of(sounds, front)
        speed = real_time(ours, peer, front, sounds[:60])
        models: dict[str, Any] = {"Paraformer": ours, "one token after another": peer}
        models |= {"Paraformer, longer": own["longer"], "Paraformer, MWER": own["MWER"]}
        for bits in (8, 4, 3, 2):
            for place, include in {"encoder": ["encoder.*"], "both": ["*"]}.items():
                models[f"Paraformer, {place} in {bits} bits"] = quantized(ours, bits, data, include)
        for name, model in models.items():
            wrong, counted = scores(model, tests)
            line = f"| {split} | {name} |  |  | {wrong:.1f} | {counted:.0f} |  |  |"
            if model in (ours, peer):
                front_end, encoder, rest = speed["ours" if model is ours else "peer"].tolist()
                pace = f"{encoder + rest:.4f} ({front_end + encoder + rest:.4f}) | {rest:.4f}"
                line = f"| {split} | {name} | {steps:,} | {weights(model) / 1e6:.2f} | {wrong:.1f} | {counted:.0f} | {pace} |"
            lines.append(line)
            print(line, flush=True)
    if asked.split is not None:
        return
    described = (__doc__ or "").strip()
    text = [
        "# Strings of spoken digits",
        "",
        described[described.index("Strings of 1") :],
        "",
        *lines,
        "",
        f"{machine()}.",
    ]
    text += [
        "`OMP_NUM_THREADS=1 python benchmarks/speech.py --weights speech`, the weights by `--device cuda --seconds 330`",
        "",
    ]
    write_table("speech", "\n".join(text))


if __name__ == "__main__":
    main()
