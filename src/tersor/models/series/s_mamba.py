"""S-Mamba: a bidirectional Mamba over variates, for multivariate forecasting (Wang et al., arXiv 2403.11144).

What it is for: long-horizon forecasting of many parallel series whose variates move together (traffic, electricity), at a
cost linear in their number. Tokens are iTransformer's, one per variate; in place of attention one Mamba block reads them
in their order and another in the reverse order. The number of variates is free at run time, their order matters.

    model = tersor.models.create("s_mamba_etth1", pred_len=192)            # or load(name, "checkpoint.pth", ...)
    forecast = model(x_enc, x_mark_enc)      # (B, seq_len, N), time marks (B, seq_len, C) or None -> (B, pred_len, N)

    tersor train s_mamba_etth1 --data ETTh1.csv --lr 7e-5 --schedule halving --patience 3     # the published recipe

x_enc in the z-scores of the training part. With T = N + C tokens of width D, the normalization m, s of iTransformer:

    z = W [x, marks]^T + b                                             (B, T, D)
    z = LN1(z + M_f(z) + flip(M_b(flip(z)))),  z = LN2(z + W2 act(W1 z))       e_layers times; flip reverses the tokens
    forecast = (P LN(z))[:N]^T * s + m                                 (B, pred_len, N)

M is Mamba-1's mixer (models/text/mamba.py) of inner width D, convolution width 2 and state d_state; there is no dropout on
its sum. The variants are those of the published scripts, look-back 96, horizon 96 where the size depends on it, and
`_long` is the size for the longer horizons of a data set. Parameter counts are ours: a published model holds 2,464 more a
layer, in modules that nothing calls.

Origin: wzhwzhwzh0921/S-D-Mamba at e7e8bf0, no licence file. Its key names are ours; keys of the uncalled modules (`man`,
`man2`, `a`) are dropped, convolutions of kernel 1 are linear layers here. Its arguments without effect (n_heads, factor,
embed, freq, class_strategy, output_attention, ...) are left out, and an activation other than "gelu" and "relu", which it
takes for GELU, is refused. The scan runs on CPUs and GPUs without mamba-ssm.

Proven: the golden cases of the published code (with and without marks, one training step); trained by us at horizon 96, test
MSE on ETTh1 0.386 (published 0.386), Exchange 0.087 (0.086, at batch 16), at 720 0.503 (0.502) and 0.856 (0.867). One linear map
shared by all variates is level with it or ahead, see benchmarks/results/forecasting.md. Not proven: the other data sets and
horizons; orders of variates other than the file's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.layers.activations import activation
from tersor.layers.checks import at_least, one_of
from tersor.layers.series_parts import InstanceScale
from tersor.models.key_maps import drop, squeeze_to
from tersor.models.registry import register
from tersor.models.series.itransformer import VariateEmbedding
from tersor.models.text.mamba import Mamba1Mixer, SSMConfig

D_CONV, EXPAND = 2, 1


@dataclass(frozen=True, kw_only=True)
class SMambaConfig:
    seq_len: int = 96  # L: look-back
    pred_len: int = 96  # horizon
    d_model: int = 512  # D
    d_state: int = 32  # numbers of state for each channel
    d_ff: int = 512
    e_layers: int = 2
    dropout: float = 0.1
    activation: str = "gelu"  # exact; or "relu"
    use_norm: bool = True

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("seq_len", "pred_len", "d_model", "d_state", "d_ff")}
        at_least("s_mamba", 1, **sizes)
        at_least("s_mamba", 0, e_layers=self.e_layers)
        one_of("s_mamba", "activation", self.activation, ("gelu", "relu"))


class EncoderLayer(nn.Module):
    def __init__(self, config: SMambaConfig) -> None:
        super().__init__()
        mixer = SSMConfig(d_state=config.d_state, d_conv=D_CONV, expand=EXPAND)
        self.attention = Mamba1Mixer(config.d_model, mixer)  # first to last token
        self.attention_r = Mamba1Mixer(config.d_model, mixer)  # last to first
        self.conv1 = nn.Linear(config.d_model, config.d_ff)  # published as convolutions of kernel 1
        self.conv2 = nn.Linear(config.d_ff, config.d_model)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = activation(config.activation, of="s_mamba")

    def forward(self, z: Tensor) -> Tensor:
        forward_scan, _ = self.attention(z)
        backward_scan, _ = self.attention_r(z.flip(1))
        z = self.norm1(z + forward_scan + backward_scan.flip(1))
        return self.norm2(z + self.dropout(self.conv2(self.dropout(self.activation(self.conv1(z))))))


class Encoder(nn.Module):
    def __init__(self, config: SMambaConfig) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.e_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.attn_layers:
            z = layer(z)
        return self.norm(z)


@register(
    "s_mamba",
    task="forecast",
    input="series",
    paper="arXiv 2403.11144",
    variants={
        "s_mamba_etth1": (1_145_696, {"d_model": 256, "d_ff": 256, "d_state": 2}),
        "s_mamba_etth2": (1_145_696, {"d_model": 256, "d_ff": 256, "d_state": 2}),
        "s_mamba_ettm1": (1_145_696, {"d_model": 256, "d_ff": 256, "d_state": 2}),
        "s_mamba_ettm1_long": (314_944, {"pred_len": 192, "d_model": 128, "d_ff": 128, "d_state": 2}),
        "s_mamba_ettm2": (1_145_696, {"d_model": 256, "d_ff": 256, "d_state": 2}),
        "s_mamba_ettm2_long": (314_944, {"pred_len": 192, "d_model": 128, "d_ff": 128, "d_state": 2}),
        "s_mamba_exchange": (348_640, {"d_model": 128, "d_ff": 128}),
        "s_mamba_weather": (6_631_008, {"e_layers": 3, "d_state": 2}),
        "s_mamba_solar": (4_638_304, {}),
        "s_mamba_ecl": (6_760_032, {"e_layers": 3, "d_state": 16}),
        "s_mamba_ecl_long": (6_956_736, {"pred_len": 192, "e_layers": 3}),
        "s_mamba_traffic": (9_176_672, {"e_layers": 4}),
        "s_mamba_pems03": (9_133_580, {"pred_len": 12, "e_layers": 4}),
        "s_mamba_pems03_48": (11_421_232, {"pred_len": 48, "e_layers": 5}),
    },
    small={"seq_len": 24, "pred_len": 12, "d_model": 32, "d_ff": 48, "d_state": 4},
)
class SMamba(nn.Module):
    """x_enc (B, seq_len, N), x_mark_enc (B, seq_len, C) or None -> forecast (B, pred_len, N)."""

    def __init__(self, config: SMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.enc_embedding = VariateEmbedding(config.seq_len, config.d_model, config.dropout)
        self.encoder = Encoder(config)
        self.projector = nn.Linear(config.d_model, config.pred_len)

    def forward(
        self,
        x_enc: Tensor,
        x_mark_enc: Tensor | None = None,
        x_dec: Tensor | None = None,  # the decoder's inputs of the other forecasters: without effect here
        x_mark_dec: Tensor | None = None,
    ) -> Tensor:
        scale = InstanceScale.of(x_enc)
        x = scale.apply(x_enc) if self.config.use_norm else x_enc
        z = self.encoder(self.enc_embedding(x, x_mark_enc))  # (B, T, D)
        forecast = self.projector(z).transpose(1, 2)[:, :, : x_enc.shape[-1]]  # (B, pred_len, N)
        return scale.undo(forecast) if self.config.use_norm else forecast

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        seq_len = self.config.seq_len
        return {"x_enc": torch.randn(batch_size, seq_len, 7), "x_mark_enc": torch.rand(batch_size, seq_len, 4) - 0.5}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        called = drop(state, r"^encoder\.attn_layers\.\d+\.(man|man2|a)\.")
        return squeeze_to(called, self.state_dict())
