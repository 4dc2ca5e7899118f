"""LMUFormer: a Legendre memory unit in the place of attention, also with spikes (Liu et al., ICLR 2024, 2402.04882).

What it is for: classifying speech while it comes in, with few parameters and a state of fixed size. Published for
Google Speech Commands: 128 frames of 128 mel bins, 35 words. The spiking form sends only zeros and ones between layers.

    model = tersor.models.load("lmuformer_gsc", "checkpoint.pth")      # or "spiking_lmuformer_gsc"
    logits = model(x)                                                  # x (B, N, in_channels) -> (B, num_classes)
    logits, state = model.stream(frames, None)                         # (B, n, in_channels) -> (B, n', num_classes)
    logits, state = model.stream(frames, state, last=True)             # the rest: as `model.all_seq(x)` at every place

    x = embed(x);   x = x + P LMU(x),   x = x + FFN(x) depths times;   logits = mean over places of (W x + b)

    embed:  four times Norm ReLU conv3, then x + conv3(x);  FFN:  ReLU Norm W2 GELU Norm W1;  Norm is BatchNorm
    LMU:    u_t = ReLU(w_u x_t + b_u)                a number a place
            m_t = A m_{t-1} + B u_t                  the memory, q numbers; all places at once by FFT, m = H * u
            h_t = ReLU(W_h [m_t; x_t] + b_h)

    A, B: zero-order hold (dt = 1) of R_i (-1 if i < j else (-1)^(i-j+1)) and R_i (-1)^i, R_i = (2i + 1) / theta; fixed.

The spiking form has Norm and LIF neurons in the place of activations, before each map, and q = 2 embed_dims. A neuron's
time is the place in the sequence: v <- v + (x - v) / 2, a spike where v >= threshold (1; 0.5 at the LMU's input), then
v = 0. Every call starts from v = 0. Backward the spike is sigmoid(4 (v - threshold)), and the reset is constant.

Convolutions look one frame ahead, five of them: a stream gives its first result after six frames, and `last` the rest.
`all_seq` and `stream` take the running mean of the features, then the linear map. Published for sequences of theta = 128
exactly; here any length works, theta stays what the memory was made for.

Origin: zeyuliu1037/LMUFormer at 5debadd (lmu_rnn_conv1d, slmu_rnn_ms_conv1d), MIT, with spikingjelly 0.0.0.0.12. Its
key names are ours; its 1x1 convolutions are linear maps here, its buffers A, B, H and fft_H are recomputed. The step form
of the published spiking cell leaves the neuron of m out and differs from its parallel form; ours is the parallel one's.

Proven: the golden cases of the published code (cells, both models at both sizes, the spiking ones in float64), parameter
counts, streams in pieces equal to the whole. Not proven: 96.5% on Speech Commands. Missing: the plain spiking form
(slmu_rnn_conv1d) and the one with spiking attention (attn_ms_conv1d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers.checks import at_least
from tersor.layers.long_convolution import long_convolution
from tersor.layers.straight_through import straight_through
from tersor.models.key_maps import drop, squeeze_to
from tersor.models.registry import register

State = Any  # nested tuples of tensors, one entry a part in the order of the forward pass

_SLOPE = 4.0  # of the spike's surrogate, spikingjelly's default
_TAU = 2.0


@dataclass(frozen=True, kw_only=True)
class LMUFormerConfig:
    in_channels: int = 128  # mel bins
    num_classes: int = 35
    embed_dims: int = 256
    mlp_ratios: int = 4
    depths: int = 1
    theta: int = 128  # frames that the memory spans; published: also the length

    def __post_init__(self) -> None:
        at_least("lmuformer", 1, in_channels=self.in_channels, num_classes=self.num_classes, depths=self.depths)
        at_least("lmuformer", 1, embed_dims=self.embed_dims, mlp_ratios=self.mlp_ratios, theta=self.theta)


class Norm(nn.BatchNorm1d):
    """BatchNorm of x (B, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Conv3(nn.Conv1d):
    """x (B, n, C) -> (B, n', C'), width 3, and the last two inputs. Without them the sequence begins here: a zero in
    front; where it ends (`last`) a zero behind."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, bias=False)

    def forward(self, x: Tensor, state: State = None, *, last: bool = True) -> tuple[Tensor, State]:  # type: ignore[override]
        x = F.pad(x, (0, 0, 1, 0)) if state is None else torch.cat((state, x), 1)
        padded = F.pad(x, (0, 0, 0, 1)) if last else x
        if padded.shape[1] < 3:
            return x.new_empty(x.shape[0], 0, self.out_channels), x
        return F.conv1d(padded.transpose(1, 2), self.weight).transpose(1, 2), x[:, -2:]


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons: x (B, n, C) and their potentials v (B, C) -> spikes and potentials."""

    def __init__(self, threshold: float = 1.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor, v: State = None) -> tuple[Tensor, State]:
        v = torch.zeros_like(x[:, 0]) if v is None else v
        spikes = []
        for each in x.unbind(1):
            v = v + (each - v) / _TAU
            above = v - self.threshold
            fired = (above >= 0).to(x.dtype)
            spikes.append(straight_through(fired, (_SLOPE * above).sigmoid()))
            v = v * (1 - fired)
        return torch.stack(spikes, 1), v


class LMU(nn.Module):
    """x (B, n, C) -> hidden (B, n, hidden_size), and the memory after it (with the neurons' potentials)."""

    A: Tensor
    B: Tensor
    H: Tensor

    def __init__(
        self, input_size: int, hidden_size: int, memory_size: int, theta: int, *, spiking: bool = False
    ) -> None:
        super().__init__()
        self.W_u = nn.Linear(input_size, 1)
        self.W_h = nn.Linear(memory_size + input_size, hidden_size)
        self.spiking = spiking
        if spiking:
            self.bn_u, self.bn_m, self.bn_h = Norm(1), Norm(memory_size), Norm(hidden_size)
            self.lif = LIF()
        A, B = legendre_memory(memory_size, theta)
        self.register_buffer("A", A.float(), persistent=False)  # (q, q)
        self.register_buffer("B", B.float(), persistent=False)  # (q, 1)
        self.register_buffer("H", impulse_response(A, B, theta).float(), persistent=False)  # (q, theta)

    def forward(self, x: Tensor, state: State = None, *, last: bool = True) -> tuple[Tensor, State]:
        v_u, v_m, v_h, memory = state or (None, None, None, None)
        u, v_u = self._fire(self.W_u(x), "bn_u", v_u)
        if state is None and last:
            m = long_convolution(u.transpose(1, 2), self._kernel(x.shape[1])).transpose(1, 2)  # (B, n, q)
        else:
            m, memory = self._remember(u, memory)
        if self.spiking:
            m, v_m = self._fire(m, "bn_m", v_m)
        h, v_h = self._fire(self.W_h(torch.cat((m, x), -1)), "bn_h", v_h)
        return h, (v_u, v_m, v_h, memory)

    def _fire(self, x: Tensor, norm: str, v: State) -> tuple[Tensor, State]:
        return self.lif(getattr(self, norm)(x), v) if self.spiking else (x.relu(), None)

    def _remember(self, u: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """u (B, n, 1), a place at a time."""
        memory = u.new_zeros(len(u), len(self.B)) if memory is None else memory
        memories = []
        for each in u.unbind(1):
            memory = memory @ self.A.t() + each @ self.B.t()
            memories.append(memory)
        return torch.stack(memories, 1), memory

    def _kernel(self, length: int) -> Tensor:
        H = self.H
        if length > H.shape[1]:
            H = impulse_response(self.A.double(), self.B.double(), length).to(H)
        return H[:, :length]


def legendre_memory(memory_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """A (q, q) and B (q, 1) for steps of 1, in float64: zero-order hold by one matrix exponential."""
    i = torch.arange(memory_size, dtype=torch.float64, device="cpu")
    rate = ((2 * i + 1) / theta)[:, None]
    lag = i[:, None] - i
    A = rate * torch.where(lag < 0, -1.0, 1.0 - 2.0 * ((lag + 1) % 2))
    B = rate * (1.0 - 2.0 * (i[:, None] % 2))
    both = torch.zeros(memory_size + 1, memory_size + 1, dtype=torch.float64, device="cpu")
    both[:-1] = torch.cat((A, B), 1)
    both = torch.linalg.matrix_exp(both)
    return both[:-1, :-1], both[:-1, -1:]


def impulse_response(A: Tensor, B: Tensor, length: int) -> Tensor:
    """A^t B for t = 0..length-1: (q, length), by doubling."""
    H, power = B, A  # H has so many places as the power
    while H.shape[1] < length:
        H = torch.cat((H, power @ H), 1)
        power = power @ power
    return H[:, :length]


class Tokenizer(nn.Module):
    def __init__(self, channels: int, d: int) -> None:
        super().__init__()
        widths = (channels, d, d, d)
        self.conv_layers = nn.ModuleList(
            nn.ModuleList((Conv3(width, d), nn.ReLU(), nn.Identity(), Norm(d))) for width in widths
        )
        self.rpe_conv = Conv3(d, d)

    def forward(self, x: Tensor, state: State = None, *, last: bool = True) -> tuple[Tensor, State]:
        after, parts = [], state or (None,) * 5
        layers: Any = self.conv_layers
        for (conv, act, _, norm), part in zip(layers, parts, strict=False):
            x, part = conv(x, part, last=last)
            after.append(part)
            x = norm(act(x)) if x.shape[1] else x
        y, part = self.rpe_conv(x, parts[4], last=last)
        return _delayed(x, parts[4], y) + y, (*after, part)


class SpikingTokenizer(nn.Module):
    def __init__(self, channels: int, d: int) -> None:
        super().__init__()
        self.proj_conv, self.proj_bn = Conv3(channels, d), Norm(d)
        self.proj_conv1, self.proj_bn1 = Conv3(d, d), Norm(d)
        self.proj_conv2, self.proj_bn2 = Conv3(d, d), Norm(d)
        self.proj_conv3, self.proj_bn3 = Conv3(d, d), Norm(d)
        self.rpe_conv = Conv3(d, d)
        self.lif = LIF()

    def forward(self, x: Tensor, state: State = None, *, last: bool = True) -> tuple[Tensor, State]:
        inputs, potentials, waiting = state or ((None,) * 5, (None,) * 4, None)
        convs = (self.proj_conv, self.proj_conv1, self.proj_conv2, self.proj_conv3, self.rpe_conv)
        norms = (self.proj_bn, self.proj_bn1, self.proj_bn2, self.proj_bn3)
        after_inputs, after_potentials, main = [], [], x
        y, part = convs[0](x, inputs[0], last=last)
        after_inputs.append(part)
        for conv, norm, past, v in zip(convs[1:], norms, inputs[1:], potentials, strict=True):
            main = y  # before the last convolution: the sum's other part
            if y.shape[1]:
                y, v = self.lif(norm(y), v)
            y, part = conv(y, past, last=last)
            after_inputs.append(part)
            after_potentials.append(v)
        main = main if waiting is None else torch.cat((waiting, main), 1)
        ready = y.shape[1]
        return main[:, :ready] + y, (tuple(after_inputs), tuple(after_potentials), main[:, ready:])


def _delayed(x: Tensor, state: State, y: Tensor) -> Tensor:
    """The inputs of a Conv3 that its outputs y belong to: those of one place earlier, where it has a state."""
    known = x if state is None else torch.cat((state[:, -1:] if state.shape[1] > 1 else state[:, :0], x), 1)
    return known[:, : y.shape[1]]


class Mixer(nn.Module):
    def __init__(self, d: int, theta: int, *, spiking: bool) -> None:
        super().__init__()
        self.prev_bn = Norm(d) if spiking else None
        self.prev_lif = LIF(0.5)
        self.lmu = LMU(d, d, 2 * d if spiking else d, theta, spiking=spiking)
        self.proj_conv = nn.Linear(d, d)  # published as a convolution of kernel 1
        self.proj_bn = Norm(d)

    def forward(self, x: Tensor, state: State = None, *, last: bool = True) -> tuple[Tensor, State]:
        v, memory = state or (None, None)
        if self.prev_bn is not None:
            x, v = self.prev_lif(self.prev_bn(x), v)
        h, memory = self.lmu(x, memory, last=last)
        return self.proj_bn(self.proj_conv(h)), (v, memory)


class FeedForward(nn.Module):
    def __init__(self, d: int, hidden: int, *, spiking: bool) -> None:
        super().__init__()
        self.spiking, self.lif = spiking, LIF()
        self.fc1_conv, self.fc1_bn = nn.Linear(d, hidden), Norm(d if spiking else hidden)
        self.fc2_conv, self.fc2_bn = nn.Linear(hidden, d), Norm(hidden if spiking else d)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        if not self.spiking:
            return self.fc2_bn(self.fc2_conv(F.gelu(self.fc1_bn(self.fc1_conv(x))))).relu(), None
        v1, v2 = state or (None, None)
        x, v1 = self.lif(self.fc1_bn(x), v1)
        x, v2 = self.lif(self.fc2_bn(self.fc1_conv(x)), v2)
        return self.fc2_conv(x), (v1, v2)


class Block(nn.Module):
    def __init__(self, config: LMUFormerConfig, *, spiking: bool) -> None:
        super().__init__()
        d = config.embed_dims
        self.attn = Mixer(d, config.theta, spiking=spiking)
        self.mlp = FeedForward(d, config.mlp_ratios * d, spiking=spiking)

    def forward(self, x: Tensor, state: State = None, *, last: bool = True) -> tuple[Tensor, State]:
        mixer_state, mlp_state = state or (None, None)
        mixed, mixer_state = self.attn(x, mixer_state, last=last)
        x = x + mixed
        widened, mlp_state = self.mlp(x, mlp_state)
        return x + widened, (mixer_state, mlp_state)


class _Former(nn.Module):
    """What both forms share; x (B, N, in_channels)."""

    def __init__(self, config: LMUFormerConfig, *, spiking: bool) -> None:
        super().__init__()
        self.config = config
        d = config.embed_dims
        self.patch_embed = (SpikingTokenizer if spiking else Tokenizer)(config.in_channels, d)
        self.block = nn.ModuleList(Block(config, spiking=spiking) for _ in range(config.depths))
        self.head_bn = Norm(d) if spiking else None
        self.head_lif = LIF()
        self.head = nn.Linear(d, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._run(x, None, last=True)[0]).mean(1)

    def features(self, x: Tensor) -> Tensor:
        """After the blocks, before the head's norm: (B, N, embed_dims)."""
        x, _ = self.patch_embed(x)
        for block in self.block:
            x, _ = block(x)
        return x

    def all_seq(self, x: Tensor) -> Tensor:
        """What is known after each place: (B, N, num_classes)."""
        return self.stream(x, None, last=True)[0]

    def stream(self, frames: Tensor, state: State = None, *, last: bool = False) -> tuple[Tensor, State]:
        """Frames (B, n, in_channels) that follow those before -> what is known after each place that is complete now,
        (B, n', num_classes), and the state. With `last` all places are complete. For eval mode."""
        sums, count, parts = state or (0.0, 0, None)
        x, parts = self._run(frames, parts, last=last)
        if not x.shape[1]:
            return x.new_empty(x.shape[0], 0, self.config.num_classes), (sums, count, parts)
        total = sums + x.cumsum(1)
        places = torch.arange(count + 1, count + x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return self.head(total / places[:, None]), (total[:, -1:], count + x.shape[1], parts)

    def _run(self, x: Tensor, state: State, *, last: bool) -> tuple[Tensor, State]:
        """The features that the head's linear map gets."""
        embed_state, block_states, v = state or (None, (None,) * len(self.block), None)
        x, embed_state = self.patch_embed(x, embed_state, last=last)
        if not x.shape[1]:
            return x, (embed_state, block_states, v)
        whole = state is None and last  # the memory by FFT; else place by place
        after = []
        for block, block_state in zip(self.block, block_states, strict=True):
            x, block_state = block(x, block_state, last=whole)
            after.append(block_state)
        if self.head_bn is not None:
            x, v = self.head_lif(self.head_bn(x), v)
        return x, (embed_state, tuple(after), v)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, self.config.theta, self.config.in_channels)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return squeeze_to(drop(state, r"\.lmu\.(A|B|H|fft_H)$"), self.state_dict())


@register(
    "lmuformer",
    task="classify",
    input="sequence",
    paper="arXiv 2402.04882",
    variants={"lmuformer_gsc": (1_621_796, {})},
    small={"in_channels": 8, "num_classes": 5, "embed_dims": 16, "depths": 2, "theta": 16},
)
class LMUFormer(_Former):
    """x (B, N, in_channels) -> logits (B, num_classes)."""

    def __init__(self, config: LMUFormerConfig) -> None:
        super().__init__(config, spiking=False)


@register(
    "spiking_lmuformer",
    task="classify",
    input="sequence",
    paper="arXiv 2402.04882",
    variants={"spiking_lmuformer_gsc": (1_689_894, {})},
    small={"in_channels": 8, "num_classes": 5, "embed_dims": 16, "theta": 8},
)
class SpikingLMUFormer(_Former):
    """x (B, N, in_channels) -> logits (B, num_classes)."""

    def __init__(self, config: LMUFormerConfig) -> None:
        super().__init__(config, spiking=True)
        for module in self.modules():
            if isinstance(module, Norm):  # else an untrained model is silent in eval mode; training overwrites it
                module.running_var.fill_(0.01)  # type: ignore[union-attr]
