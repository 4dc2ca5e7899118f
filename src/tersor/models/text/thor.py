"""THOR: a transformer with stochastic experts for translation (Zuo et al., ICLR 2022, arXiv 2110.04260).

What it is for: a mixture of experts without a router. Every other feed-forward layer has several experts, and one
of them is drawn by lot, in training and in use; a consistency loss makes them agree. The cost is a dense model's.

    model = tersor.models.load("thor_iwslt", "checkpoint_best.pt", vocab=10152)
    logits = model(input_ids, decoder_input_ids)                       # (B, S), (B, T) -> (B, T, vocab)
    loss = training_loss(model, input_ids, decoder_input_ids, target)["loss"]
    memory = model.encode(input_ids);  logits, state = model.prefill(decoder_input_ids, memory)
    logits, state = model.step(token, state, memory)                   # token (B,) -> (B, vocab)

    x = sqrt(d) E[ids] + P                                             sines, then cosines, of n = 2, 3, ... (not padding)
    encoder:   x = LN(x + A x),                   x = LN(x + F x)
    decoder:   x = LN(x + A x),  x = LN(x + C x), x = LN(x + F x)      A causal; C attends to the encoder's result
    F x = W2_e ReLU(W1_e x)      e = 0 in odd layers; in layers 0, 2, ... one of num_experts
    logits = E x                                                       one matrix for all three

    loss = CE_1 + CE_2 + alpha KL,   KL = 1/2 sum (p - q)(log p - log q)      two runs that draw by themselves

Training draws one expert a layer for the whole batch; `experts` of training_loss fixes the one of each run. In eval all
experts are run and each token keeps one by lot: inference_level 0 for each place and sequence, 1 for each place (called
"sentence" there). `routes` gives the lots instead: a tensor of expert numbers for each expert layer, encoder first,
(time, B) or (time,). An int takes that expert everywhere. Losses are sums over tokens; CE is smoothed by 0.1.

Padding is 1, sources are padded on the left, targets on the right, a decoder begins with eos, 2. Quirk kept: no LayerNorm
after the last layer, for all norms come after their sum.

Origin: microsoft/Stochastic-Mixture-of-Experts at 7c43d18 (fairseq of June 2021), MIT. Its key names are ours.

Proven: the golden cases of the published code (both levels, losses, the IWSLT size), any expert's model equal to its dense
one, cached steps equal to the whole. Not proven: the published BLEU. The WMT models' sizes are not known well enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.models.key_maps import drop
from tersor.models.registry import register

PADDING, EOS = 1, 2
Routes = int | list[Tensor] | None
LayerState = tuple[Tensor, Tensor]  # keys and values, each (B, heads, past, d)
State = tuple[list[LayerState], Tensor]  # and which tokens of the past are padding, (B, past)


@dataclass(frozen=True, kw_only=True)
class THORConfig:
    vocab: int = 10152
    encoder_embed_dim: int = 512
    encoder_ffn_embed_dim: int = 1024
    encoder_attention_heads: int = 4
    encoder_layers: int = 6
    decoder_embed_dim: int = 512
    decoder_ffn_embed_dim: int = 1024
    decoder_attention_heads: int = 4
    decoder_layers: int = 6
    num_experts: int = 2
    consistency_alpha: float = 5.0
    inference_level: int = 0  # lots for each token; 1: for each place, shared by the batch
    dropout: float = 0.3
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least("thor", 1, vocab=self.vocab, num_experts=self.num_experts)
        at_least("thor", 1, encoder_layers=self.encoder_layers, decoder_layers=self.decoder_layers)
        divides(
            "thor", "encoder_attention_heads", self.encoder_attention_heads, "encoder_embed_dim", self.encoder_embed_dim
        )
        divides(
            "thor", "decoder_attention_heads", self.decoder_attention_heads, "decoder_embed_dim", self.decoder_embed_dim
        )
        one_of("thor", "inference_level", self.inference_level, (0, 1))
        if self.encoder_embed_dim != self.decoder_embed_dim:
            raise TersorError(
                f"thor shares one embedding: encoder_embed_dim {self.encoder_embed_dim} must be decoder_embed_dim "
                f"{self.decoder_embed_dim}"
            )


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.q_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)
        for project in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(project.weight, gain=0.5**0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        for project in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            nn.init.zeros_(project.bias)

    def forward(
        self, x: Tensor, source: Tensor, hidden: Tensor, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState]:
        """x (B, T, d) asks source (B, S, d); hidden, True where not to look, broadcasts to (B, heads, T, past + S)."""
        q = rearrange(self.q_proj(x), "b l (h d) -> b h l d", h=self.heads)
        k, v = (rearrange(w(source), "b l (h d) -> b h l d", h=self.heads) for w in (self.k_proj, self.v_proj))
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, dropout_p=dropout)
        return self.out_proj(rearrange(y, "b h l d -> b l (h d)")), (k, v)


class Lots:
    """Which expert the next expert layer takes: drawn, or as told."""

    def __init__(self, routes: Routes, config: THORConfig, *, training: bool) -> None:
        self.config, self.training = config, training
        self.fixed = routes if isinstance(routes, int) else None
        self.given: Iterator[Tensor] | None = iter(routes) if isinstance(routes, list) else None
        if self.fixed is not None and not 0 <= self.fixed < config.num_experts:
            raise TersorError(f"thor has no expert {self.fixed}, only 0 to {config.num_experts - 1}")

    def next(self, x: Tensor) -> int | Tensor:
        """One expert for all of x (B, T, d), or one each: (B, T) or (1, T)."""
        if self.fixed is not None:
            return self.fixed
        if self.given is not None:
            route = next(self.given, None)
            if route is None:
                raise TersorError("thor got fewer routes than it has expert layers")
            return route.t() if route.dim() == 2 else route[None]
        experts = self.config.num_experts
        if self.training:
            return int(torch.randint(experts, ()))
        rows = x.shape[0] if self.config.inference_level == 0 else 1
        return torch.randint(experts, (rows, x.shape[1]), device=x.device)


class Layer(nn.Module):
    """Of the encoder, or with `cross` of the decoder. Layers with experts hold them as fc1.{e}, fc2.{e}."""

    def __init__(self, config: THORConfig, index: int, *, cross: bool) -> None:
        super().__init__()
        side = "decoder" if cross else "encoder"
        d, hidden, heads = (
            getattr(config, f"{side}_{name}") for name in ("embed_dim", "ffn_embed_dim", "attention_heads")
        )
        self.self_attn = Attention(d, heads, config.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(d)
        self.encoder_attn = Attention(d, heads, config.attention_dropout) if cross else None
        if cross:
            self.encoder_attn_layer_norm = nn.LayerNorm(d)
        self.experts = config.num_experts if index % 2 == 0 else 0
        if self.experts:
            self.fc1: nn.Module = nn.ModuleList(_linear(d, hidden) for _ in range(self.experts))
            self.fc2: nn.Module = nn.ModuleList(_linear(hidden, d) for _ in range(self.experts))
        else:
            self.fc1, self.fc2 = _linear(d, hidden), _linear(hidden, d)
        self.final_layer_norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(
        self,
        x: Tensor,
        lots: Lots,
        hidden: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, LayerState]:
        mixed, state = self.self_attn(x, x, hidden, state)
        x = self.self_attn_layer_norm(x + self.dropout(mixed))
        if self.encoder_attn is not None:
            assert memory is not None
            mixed, _ = self.encoder_attn(x, *memory)
            x = self.encoder_attn_layer_norm(x + self.dropout(mixed))
        return self.final_layer_norm(x + self.dropout(self._widen(x, lots))), state

    def _widen(self, x: Tensor, lots: Lots) -> Tensor:
        if not isinstance(self.fc1, nn.ModuleList) or not isinstance(self.fc2, nn.ModuleList):
            return self._expert(x, self.fc1, self.fc2)
        lot = lots.next(x)
        if isinstance(lot, int):
            return self._expert(x, self.fc1[lot], self.fc2[lot])
        results = torch.stack([self._expert(x, *pair) for pair in zip(self.fc1, self.fc2, strict=True)])  # (e, B, T, d)
        chosen = lot.to(x.device).long().expand(x.shape[:2])[None, :, :, None].expand(-1, -1, -1, x.shape[2])
        return results.gather(0, chosen)[0]

    def _expert(self, x: Tensor, fc1: nn.Module, fc2: nn.Module) -> Tensor:
        return fc2(self.activation_dropout(fc1(x).relu()))


def _linear(d: int, out: int) -> nn.Linear:
    layer = nn.Linear(d, out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Side(nn.Module):
    """What encoder and decoder share: the embedding with its positions, and the layers."""

    def __init__(self, config: THORConfig, *, decoder: bool) -> None:
        super().__init__()
        d, count = config.encoder_embed_dim, config.decoder_layers if decoder else config.encoder_layers
        self.embed_tokens = nn.Embedding(config.vocab, d, padding_idx=PADDING)
        self.layers = nn.ModuleList(Layer(config, index, cross=decoder) for index in range(count))
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, ids: Tensor, past: Tensor | None = None) -> Tensor:
        """past (B, n): True where an earlier token was padding."""
        x = self.embed_tokens(ids)
        d = x.shape[-1]
        real = (ids != PADDING).long()
        number = real.cumsum(1)
        if past is not None:
            number = number + (~past).sum(1, keepdim=True)
        position = number * real + PADDING  # padding keeps the row of zeros
        rate = torch.exp(torch.arange(d // 2, device=x.device) * (-math.log(10_000) / (d // 2 - 1)))
        angle = position[..., None] * rate
        table = F.pad(torch.cat((angle.sin(), angle.cos()), -1), (0, d % 2)) * real[..., None]
        return self.dropout(math.sqrt(d) * x + table.to(x.dtype))


class Decoder(Side):
    def __init__(self, config: THORConfig) -> None:
        super().__init__(config, decoder=True)
        self.output_projection = nn.Linear(config.decoder_embed_dim, config.vocab, bias=False)


@register(
    "thor",
    task="translate",
    input="tokens",
    paper="arXiv 2110.04260",
    variants={
        "thor_iwslt": (43_041_792, {}),
    },
    small={
        "vocab": 40,
        "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 32,
        "encoder_attention_heads": 2,
        "encoder_layers": 2,
        "decoder_embed_dim": 16,
        "decoder_ffn_embed_dim": 32,
        "decoder_attention_heads": 2,
        "decoder_layers": 2,
        "num_experts": 1,  # more would draw lots in each call
        "dropout": 0.0,
    },
)
class THOR(nn.Module):
    """input_ids (B, S), decoder_input_ids (B, T) -> logits (B, T, vocab)."""

    def __init__(self, config: THORConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Side(config, decoder=False)
        self.decoder = Decoder(config)
        shared = self.encoder.embed_tokens.weight
        nn.init.normal_(shared, std=config.encoder_embed_dim**-0.5)
        with torch.no_grad():
            shared[PADDING] = 0
        self.decoder.embed_tokens.weight = self.decoder.output_projection.weight = shared

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, routes: Routes = None) -> Tensor:
        lots = Lots(routes, self.config, training=self.training)
        memory = self._encode(input_ids, lots)
        return self._decode(decoder_input_ids, memory, lots, None)[0]

    def encode(self, input_ids: Tensor, routes: Routes = None) -> tuple[Tensor, Tensor]:
        """The encoder's result (B, S, d), and True where it is padding, (B, 1, 1, S)."""
        return self._encode(input_ids, Lots(routes, self.config, training=self.training))

    def prefill(
        self,
        decoder_input_ids: Tensor,
        memory: tuple[Tensor, Tensor],
        state: State | None = None,
        routes: Routes = None,
    ) -> tuple[Tensor, State]:
        """Logits of all target tokens given what `encode` made of the source, and the state after the last."""
        return self._decode(decoder_input_ids, memory, Lots(routes, self.config, training=self.training), state)

    def step(
        self, token: Tensor, state: State, memory: tuple[Tensor, Tensor], routes: Routes = None
    ) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, vocab) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], memory, state, routes)
        return logits[:, 0], state

    def _encode(self, ids: Tensor, lots: Lots) -> tuple[Tensor, Tensor]:
        padding = ids == PADDING
        x = self.encoder.embed(ids) * ~padding[..., None]
        for layer in self.encoder.layers:
            x, _ = layer(x, lots, padding[:, None, None])
        return x, padding[:, None, None]

    def _decode(
        self, ids: Tensor, memory: tuple[Tensor, Tensor], lots: Lots, state: State | None
    ) -> tuple[Tensor, State]:
        states, earlier = state or ([], None)
        x = self.decoder.embed(ids, earlier)
        padding = ids == PADDING if earlier is None else torch.cat((earlier, ids == PADDING), 1)
        past = padding.shape[1] - ids.shape[1]
        future = torch.ones(ids.shape[1], padding.shape[1], dtype=torch.bool, device=ids.device).triu(past + 1)
        hidden = future | padding[:, None, None]
        after = []
        for index, layer in enumerate(self.decoder.layers):
            x, layer_state = layer(x, lots, hidden, memory, states[index] if states else None)
            after.append(layer_state)
        return self.decoder.output_projection(x), (after, padding)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        low = EOS + 1
        source = torch.randint(low, self.config.vocab, (batch_size, 9))
        return {"input_ids": source, "decoder_input_ids": torch.randint(low, self.config.vocab, (batch_size, 7))}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = drop(state, r"\.version$", r"embed_positions\._float_tensor$")
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
        shared = [state[name] for name in names if name in state]
        return state | dict.fromkeys(names, shared[-1]) if shared else state


def smoothed_cross_entropy(logits: Tensor, target: Tensor, *, smoothing: float = 0.1) -> tuple[Tensor, Tensor]:
    """Sums over the target's tokens (B, T) but padding: the loss with label smoothing, and without."""
    real = target != PADDING
    log_p = logits.float().log_softmax(-1)[real]  # (n, V)
    nll = -log_p.gather(1, target[real][:, None]).sum()
    other = smoothing / (log_p.shape[1] - 1)
    return (1 - smoothing - other) * nll - other * log_p.sum(), nll


def consistency(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """1/2 sum (p - q)(log p - log q) over the vocabulary and the target's tokens but padding."""
    real = target != PADDING
    log_p, log_q = (each.float().log_softmax(-1)[real] for each in (first, second))
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


def training_loss(
    model: THOR,
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    target: Tensor,
    *,
    experts: tuple[int | None, int | None] = (None, None),
) -> dict[str, Tensor]:
    """Two runs, which draw their experts or are given one. All sums over tokens; divide "loss" by their number."""
    runs = [model(input_ids, decoder_input_ids, expert) for expert in experts]
    (loss1, nll1), (loss2, nll2) = (smoothed_cross_entropy(logits, target) for logits in runs)
    agreement = consistency(runs[0], runs[1], target)
    total = loss1 + loss2 + model.config.consistency_alpha * agreement
    return {"loss": total, "nll": (nll1 + nll2) / 2, "consistency": agreement}
