"""Speech to features: Kaldi's log-mel filterbank, stacking of frames to a lower rate, and mean and variance from a file.

    features = low_frame_rate(filterbank(waveform))                    # (560,) each 60 ms, from 16 kHz audio in [-1, 1]
    features = Normalization.read("am.mvn")(features)                  # the file beside a Paraformer checkpoint

Filterbank, per frame of 25 ms each 10 ms (only whole frames): minus its mean, pre-emphasis x_i - 0.97 x_{i-1}, Hamming
window, power spectrum of the next power of two, 80 triangles evenly spaced in mel = 1127 ln(1 + f / 700) from 20 Hz to half the
sampling rate, log of at least float32's epsilon. The waveform is scaled to 16-bit integers first.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersor.errors import TersorError

_SCALE = 32768.0
_PRE_EMPHASIS = 0.97
_LOWEST_HZ = 20.0


def filterbank(
    waveform: Tensor,
    *,
    sampling_rate: int = 16_000,
    bins: int = 80,
    frame_ms: float = 25.0,
    shift_ms: float = 10.0,
    window: str = "hamming",
    dither: float = 0.0,
) -> Tensor:
    """waveform (samples,) in [-1, 1] -> (T, bins), float32. `dither`: noise in 16-bit steps, 1.0 in training."""
    size, shift = int(sampling_rate * frame_ms / 1000), int(sampling_rate * shift_ms / 1000)
    if waveform.dim() != 1 or len(waveform) < size:
        raise TersorError(
            f"speech is one channel of at least {size} samples ({frame_ms:g} ms), not {list(waveform.shape)}"
        )
    frames = (waveform.double() * _SCALE).unfold(0, size, shift)  # (T, size)
    if dither:
        frames = frames + dither * torch.randn_like(frames)
    frames = frames - frames.mean(1, keepdim=True)
    previous = torch.cat((frames[:, :1], frames[:, :-1]), 1)
    frames = (frames - _PRE_EMPHASIS * previous) * _window(window, size).to(frames.device)
    fft = 1 << (size - 1).bit_length()
    power = torch.fft.rfft(frames, fft).abs().square()  # (T, fft/2 + 1)
    energies = power @ mel_triangles(bins, fft, sampling_rate).to(frames.device)
    features: Tensor = energies.clamp(min=torch.finfo(torch.float32).eps).log().float()
    return features


def mel_triangles(bins: int, fft: int, sampling_rate: int) -> Tensor:
    """(fft/2 + 1, bins), float64."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * (1 + hertz / 700.0).log()

    low, high = mel(torch.tensor([_LOWEST_HZ, sampling_rate / 2], dtype=torch.float64))
    edges = low + (high - low) / (bins + 1) * torch.arange(bins + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    at = mel(torch.arange(fft // 2 + 1, dtype=torch.float64) * sampling_rate / fft)[:, None]
    return torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp(min=0)


def low_frame_rate(frames: Tensor, *, m: int = 7, n: int = 6) -> Tensor:
    """(T, D) -> (ceil(T / n), m D): m neighbours side by side, each n frames; the ends are repeated."""
    count = math.ceil(len(frames) / n)
    index = torch.arange(count)[:, None] * n + torch.arange(m) - (m - 1) // 2
    return frames[index.clamp(0, len(frames) - 1)].flatten(1)


@dataclass(frozen=True)
class Normalization:
    """(x + shift) * scale, each (D,)."""

    shift: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return (features + self.shift.to(features)) * self.scale.to(features)

    @classmethod
    def read(cls, path: str | Path) -> Normalization:
        """Kaldi's text form: the numbers in brackets after <AddShift> and after <Rescale>."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TersorError(f"cannot read {path}: {error}") from None
        vectors = []
        for name in ("AddShift", "Rescale"):
            found = re.search(rf"<{name}>.*?\[([^\]]*)\]", text, re.DOTALL)
            try:
                vectors.append(torch.tensor([float(number) for number in found[1].split()] if found else []))
            except ValueError:
                raise TersorError(f"{path}: <{name}> holds something that is not a number") from None
        if not vectors[0].numel() or vectors[0].shape != vectors[1].shape:
            sizes = " and ".join(str(len(vector)) for vector in vectors)
            raise TersorError(f"{path} needs <AddShift> and <Rescale> with equally many numbers, it has {sizes}")
        return cls(*vectors)


def _window(name: str, size: int) -> Tensor:
    turn = 2 * math.pi * torch.arange(size, dtype=torch.float64) / (size - 1)
    windows = {
        "hamming": 0.54 - 0.46 * turn.cos(),
        "hanning": 0.5 - 0.5 * turn.cos(),
        "rectangular": torch.ones_like(turn),
    }
    windows["povey"] = windows["hanning"] ** 0.85
    if name not in windows:
        raise TersorError(f"the window is one of {', '.join(windows)}, not {name!r}")
    return windows[name]
