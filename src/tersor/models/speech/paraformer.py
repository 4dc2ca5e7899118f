"""Paraformer: speech to text in one pass (Gao et al., Interspeech 2022, arXiv 2206.08317).

What it is for: transcription many times faster than a decoder that writes token after token. The encoder reads
filterbank frames, a predictor counts the tokens and pools the frames into one vector a token (integrate-and-fire), and a
decoder that sees all of them names every token at once.

    model = tersor.models.load("paraformer_zh", "model.pt")               # FunASR's layout
    speech = normalize(low_frame_rate(filterbank(waveform)))[None]        # tersor.data.speech_features; (1, T, 560)
    tokens = model.transcribe(speech, torch.tensor([speech.shape[1]]))    # lists of ids, without blank, start and end

speech (B, T, input_size), speech_lengths (B,) -> log-probabilities (B, N, V) and the token counts (B,); N is the largest
count. h (B, T', D) is the encoder's result; a (B, T') are weights from 0 to 1:

    h = encoder(speech)           "sanm": T' = T, attention plus a depthwise convolution of the values (FSMN memory)
                                  "conformer": T' = about T/4, relative positions, convolution modules
    a = sigmoid(w ReLU(conv h))   "v2": full convolution; "v1": depthwise, added to h first
    e = fire(a, h)                (B, N, D), see tersor.layers.integrate_and_fire; a tail weight of 0.45 is added at the end
    logits = decoder(e, h)        "sanm": feed-forward, FSMN, cross-attention; "san": an ordinary decoder. No positions

In training the weights are scaled to the true count N, and the glancing sampler runs the decoder twice: of the tokens that
the first pass gets wrong, `sampling_ratio` as many random positions get the label's embedding for the second pass.

    losses = model.losses(speech, speech_lengths, text, text_lengths)     # text (B, L), padded with -1
    losses.loss = CE + |count error|, or CTC's share ctc_weight, CE's 1 - ctc_weight, and |count error|

tersor.train.mwer adds the minimum word error rate loss.

Origin: modelscope/FunASR at 3c58cb5 (models/paraformer, sanm, conformer, transformer), MIT; weights under the FunASR
model licence. Its key names are ours. Quirks kept: the first SANM layer has no residual around attention; the
feed-forward part of a SANM decoder layer has none either; Conformer's convolution is not masked, so padding leaks into the
last frames of shorter rows; its relative positions are the legacy ones, a table read from its far end, with the shift that
wraps; the last token's vector in training may be zero by rounding. Initialisation is PyTorch's.

Proven: the golden cases of the published code (both encoders and decoders, both predictors, training loss with gradients,
integrate-and-fire, front end), parameter counts of the Chinese large model and the AISHELL-1 recipe; properties of
streaming, padding and the error-rate loss; spoken digits, learned by a small one (benchmarks/results/speech.md). Not proven:
error rates (1.95 % and 5.11 % on AISHELL-1 published); the streaming encoder, timestamps, and beam search are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.integrate_and_fire import fire_in_steps, integrate_and_fire
from tersor.models.registry import register
from tersor.models.speech.paraformer_parts import ConformerEncoder, SANDecoder, SANMDecoder, SANMEncoder, padding_mask

BLANK, START, END = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class ParaformerConfig:
    input_size: int = 560
    vocab_size: int = 8404  # V
    encoder: str = "sanm"  # or "conformer"
    output_size: int = 512  # D
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 50
    kernel_size: int = 11  # of the FSMN memory, or of Conformer's convolution
    shift: int = 0  # frames by which the encoder's memory looks back more and ahead less
    macaron_style: bool = True  # conformer: a half feed-forward before attention too
    use_cnn_module: bool = True  # conformer
    decoder: str = "sanm"  # or "san"
    decoder_heads: int = 4
    decoder_units: int = 2048
    decoder_blocks: int = 16
    att_layer_num: int = 16  # sanm: blocks with cross-attention, the others come after them
    decoder_kernel: int = 11
    decoder_shift: int = 0
    predictor: str = "v2"  # or "v1"
    threshold: float = 1.0  # v1; v2 fires at 1
    l_order: int = 1  # frames that the predictor sees to the left
    r_order: int = 1
    tail_threshold: float = 0.45
    smooth_factor: float = 1.0
    noise_threshold: float = 0.0
    dropout: float = 0.1
    ctc_weight: float = 0.0  # above 0: a CTC head
    lsm_weight: float = 0.1  # label smoothing
    length_normalized_loss: bool = True  # per token instead of per sample
    predictor_weight: float = 1.0
    predictor_bias: int = 1  # 1: labels get an end token
    sampling_ratio: float = 0.75  # 0: one pass

    def __post_init__(self) -> None:
        one_of("paraformer", "encoder", self.encoder, ("sanm", "conformer"))
        one_of("paraformer", "decoder", self.decoder, ("sanm", "san"))
        one_of("paraformer", "predictor", self.predictor, ("v1", "v2"))
        one_of("paraformer", "predictor_bias", self.predictor_bias, (0, 1))
        at_least("paraformer", 0, ctc_weight=self.ctc_weight, sampling_ratio=self.sampling_ratio)
        at_least("paraformer", END + 1, vocab_size=self.vocab_size)
        divides("paraformer", "attention_heads", self.attention_heads, "output_size", self.output_size)
        divides("paraformer", "decoder_heads", self.decoder_heads, "output_size", self.output_size)
        if self.encoder == "sanm":
            divides("paraformer", "two, for its position table,", 2, "input_size", self.input_size)
        elif self.input_size < 7:
            raise TersorError(
                f"paraformer's conformer subsamples features by 4; input_size {self.input_size} is below 7"
            )
        if not 0 <= self.att_layer_num <= self.decoder_blocks and self.decoder == "sanm":
            raise TersorError(
                f"paraformer has {self.decoder_blocks} decoder_blocks, att_layer_num is {self.att_layer_num}"
            )


@dataclass(frozen=True)
class Predicted:
    """Of the predictor: a vector for each token (B, N, D), the count (B,), weights and peaks (B, T' or T' + 1)."""

    embeds: Tensor
    token_num: Tensor
    alphas: Tensor
    peaks: Tensor


@dataclass(frozen=True)
class ParaformerLosses:
    """Scalars, and of the second pass its inputs (B, N, D) and logits (B, N, V)."""

    loss: Tensor
    attention: Tensor
    length: Tensor
    ctc: Tensor
    embeds: Tensor
    logits: Tensor


class Predictor(nn.Module):
    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        d, self.config = config.output_size, config
        kernel, groups = config.l_order + config.r_order + 1, d if config.predictor == "v1" else 1
        self.cif_conv1d = nn.Conv1d(d, d, kernel, groups=groups)
        self.cif_output = nn.Linear(d, 1)
        self.dropout = nn.Dropout(config.dropout)

    def weights(self, h: Tensor, mask: Tensor) -> Tensor:
        """(B, T'), zero in the padding."""
        config = self.config
        y = self.cif_conv1d(F.pad(h.transpose(1, 2), (config.l_order, config.r_order))).transpose(1, 2)
        if config.predictor == "v1":
            y = self.dropout(y + h)
        alphas = self.cif_output(y.relu()).sigmoid()[..., 0]
        return (alphas * config.smooth_factor - config.noise_threshold).relu() * mask

    def forward(
        self, h: Tensor, mask: Tensor, target_lengths: Tensor | None = None, length: int | None = None
    ) -> Predicted:
        """length: N in training, where it is known; else a GPU is asked for the largest of target_lengths."""
        alphas = self.weights(h, mask)
        if target_lengths is not None:
            total = alphas.sum(1)
            length = int(target_lengths.max()) if length is None else length
            embeds, peaks = self.fire(h, alphas * (target_lengths / total)[:, None], length)
            return Predicted(embeds, total, alphas, peaks)
        h, alphas = F.pad(h, (0, 0, 0, 1)), F.pad(alphas, (0, 1))  # a frame of zeros
        if self.config.tail_threshold > 0:
            ends = torch.arange(alphas.shape[1], device=h.device) == mask.sum(1, keepdim=True)
            alphas = alphas + ends * self.config.tail_threshold  # at the first place after the speech
        count = alphas.sum(1).floor()
        embeds, peaks = self.fire(h, alphas, int(count.max()))
        return Predicted(embeds, count, alphas, peaks)

    def fire(self, h: Tensor, alphas: Tensor, length: int) -> tuple[Tensor, Tensor]:
        if self.config.predictor == "v2":
            return integrate_and_fire(h, alphas, length=length)
        return fire_in_steps(h, alphas, threshold=self.config.threshold, length=length)[:2]


class CTC(nn.Module):
    def __init__(self, d: int, vocab: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(d, vocab)

    def forward(self, h: Tensor) -> Tensor:
        return self.ctc_lo(h).log_softmax(-1)


@register(
    "paraformer",
    task="transcribe",
    input="speech",
    paper="arXiv 2206.08317",
    variants={
        "paraformer_zh": (220_084_533, {}),
        "paraformer_en": (221_740_933, {"vocab_size": 10020}),
        "paraformer_aishell": (
            46_199_317,
            {
                "input_size": 80,
                "vocab_size": 4234,
                "encoder": "conformer",
                "output_size": 256,
                "num_blocks": 12,
                "kernel_size": 15,
                "decoder": "san",
                "decoder_blocks": 6,
                "att_layer_num": 6,
                "predictor": "v1",
                "ctc_weight": 0.3,
                "length_normalized_loss": False,
                "predictor_bias": 0,
                "sampling_ratio": 0.4,
            },
        ),
    },
    small={
        "input_size": 56,
        "vocab_size": 20,
        "output_size": 32,
        "linear_units": 48,
        "num_blocks": 2,
        "kernel_size": 5,
        "decoder_units": 48,
        "decoder_blocks": 2,
        "att_layer_num": 1,
        "decoder_kernel": 5,
        "dropout": 0.0,
    },
    untraceable="the number of tokens is read from the speech, so shapes depend on values",
)
class Paraformer(nn.Module):
    """speech (B, T, input_size), speech_lengths (B,) -> log-probabilities (B, N, V), token counts (B,).

    text (B, L), padded with -1, and text_lengths (B,), if given -> ParaformerLosses.
    """

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.config = config
        d, dropout = config.output_size, config.dropout
        encoder = (
            config.input_size,
            d,
            config.attention_heads,
            config.linear_units,
            config.num_blocks,
            config.kernel_size,
        )
        self.encoder: nn.Module
        self.decoder: SANMDecoder | SANDecoder
        if config.encoder == "sanm":
            self.encoder = SANMEncoder(*encoder, shift=config.shift, dropout=dropout)
        else:
            parts = {"macaron": config.macaron_style, "convolution": config.use_cnn_module}
            self.encoder = ConformerEncoder(*encoder, dropout=dropout, **parts)
        decoder = (config.vocab_size, d, config.decoder_heads, config.decoder_units, config.decoder_blocks)
        if config.decoder == "sanm":
            self.decoder = SANMDecoder(
                *decoder, config.att_layer_num, config.decoder_kernel, shift=config.decoder_shift, dropout=dropout
            )
        else:
            self.decoder = SANDecoder(*decoder, dropout=dropout)
        self.predictor = Predictor(config)
        if config.ctc_weight > 0:
            self.ctc = CTC(d, config.vocab_size)

    def encode(self, speech: Tensor, speech_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, T', D), mask (B, T')."""
        if speech.dim() != 3 or speech.shape[2] != self.config.input_size:
            raise TersorError(
                f"this paraformer takes (batch, frames, {self.config.input_size}), not {list(speech.shape)}"
            )
        return self.encoder(speech, padding_mask(speech_lengths, speech.shape[1]))

    def forward(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        text: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | ParaformerLosses:
        """With a text what `losses` gives."""
        if text is not None and text_lengths is not None:
            return self.losses(speech, speech_lengths, text, text_lengths)
        log_probs, predicted = self.recognize(speech, speech_lengths)
        return log_probs, predicted.token_num.round().long()

    def recognize(self, speech: Tensor, speech_lengths: Tensor) -> tuple[Tensor, Predicted]:
        """Log-probabilities (B, N, V), and what the predictor found: of its peaks follow the tokens' times."""
        h, mask = self.encode(speech, speech_lengths)
        predicted = self.predictor(h, mask)
        counts = predicted.token_num.round().long()
        return self.decode(predicted.embeds, counts, h, mask).log_softmax(-1), predicted

    def decode(self, embeds: Tensor, counts: Tensor, h: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, N, V)."""
        if embeds.shape[1] == 0:  # silence
            return embeds.new_zeros(len(embeds), 0, self.config.vocab_size)
        return self.decoder(embeds, padding_mask(counts, embeds.shape[1]), h, mask)

    @torch.no_grad()
    def transcribe(self, speech: Tensor, speech_lengths: Tensor) -> list[list[int]]:
        log_probs, predicted = self.recognize(speech, speech_lengths)
        rows = zip(log_probs.argmax(-1).tolist(), predicted.token_num.round().long().tolist(), strict=True)
        return [[token for token in row[:count] if token not in (BLANK, START, END)] for row, count in rows]

    def losses(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        *,
        order: Callable[[int], Tensor]
        | None = None,  # of a row's positions: its first k are shown the label; None: random
    ) -> ParaformerLosses:
        config = self.config
        h, mask = self.encode(speech, speech_lengths)
        ctc = self.ctc_loss(h, mask, text, text_lengths) if config.ctc_weight > 0 else h.new_zeros(())
        labels, lengths = (text, text_lengths) if not config.predictor_bias else _with_end(text, text_lengths)
        predicted = self.predictor(h, mask, lengths, labels.shape[1])
        embeds = predicted.embeds
        if config.sampling_ratio > 0:
            embeds = self.glance(embeds, labels, lengths, h, mask, order)
        logits = self.decode(embeds, lengths, h, mask)
        normalizer = lengths.sum() if config.length_normalized_loss else len(speech)
        real = padding_mask(lengths, labels.shape[1])
        each = smoothed_cross_entropy(logits, labels.clamp(min=0), config.lsm_weight)
        attention = torch.where(real, each, 0).sum() / normalizer
        length = (lengths - predicted.token_num).abs().sum() / normalizer
        loss = config.ctc_weight * ctc + (1 - config.ctc_weight) * attention + config.predictor_weight * length
        return ParaformerLosses(loss, attention, length, ctc, embeds, logits)

    def glance(
        self,
        embeds: Tensor,
        labels: Tensor,
        lengths: Tensor,
        h: Tensor,
        mask: Tensor,
        order: Callable[[int], Tensor] | None,
    ) -> Tensor:
        """The embeddings with those of labels at some positions, more where the first pass is wrong more."""
        with torch.no_grad():
            guessed = self.decode(embeds, lengths, h, mask).argmax(-1)
        real = padding_mask(lengths, labels.shape[1])
        wrong = lengths - ((guessed == labels) & real).sum(1)
        if order is None:
            keys = torch.rand(real.shape, device=h.device).masked_fill(~real.bool(), 2.0)
        else:
            keys = torch.full(real.shape, 2.0)
            for row, length in enumerate(lengths.tolist()):
                keys[row, order(length)] = torch.arange(length) / length
        rank = keys.to(h.device).argsort(1).argsort(1)  # a position's place in its row's order
        shown = rank < (wrong * self.config.sampling_ratio).long()[:, None]
        known = self.decoder.embed(labels.clamp(min=0))
        return torch.where(shown[..., None], known, embeds) * real[..., None]

    def ctc_loss(self, h: Tensor, mask: Tensor, text: Tensor, text_lengths: Tensor) -> Tensor:
        log_probs = self.ctc(h).transpose(0, 1)
        frames = mask.sum(1)
        total = F.ctc_loss(log_probs, text.clamp(min=0), frames, text_lengths, BLANK, "sum", zero_infinity=True)
        return total / len(h)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        lengths = torch.full((batch_size,), 24)
        return {"speech": torch.randn(batch_size, 24, self.config.input_size), "speech_lengths": lengths}


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Logits (..., V), labels (...) -> (...): KL from softmax to 1 - smoothing on the label and the rest even on all others."""
    others = smoothing / (logits.shape[-1] - 1)
    target = torch.full_like(logits, others).scatter_(-1, labels[..., None], 1 - smoothing)
    return F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)


def _with_end(text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    longer = F.pad(text, (0, 1), value=-1)
    return longer.scatter(1, lengths[:, None], END), lengths + 1
