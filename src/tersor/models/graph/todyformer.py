"""Todyformer, a transformer for graphs whose edges come one after another in time (Huawei, 2024, arXiv 2402.05944).

What it is for: saying which two nodes will meet next, or what class a node has, from the last W events of a stream.

    model = tersor.models.create("todyformer", node_dim=32, pair="product")
    batches = LinkBatches(stream, window=4096, node_dim=32)                            # tersor.data.dynamic_graphs
    logits = model(edge_index, time, x, query)                                         # of the pairs `query` (2, B): (B,)

An event is an edge edge_index[:, i] between two of V nodes x [V, node_dim] at time[i], ascending, with edge_attr[i].
`tersor train todyformer --data events.csv` does all of that for a file with the columns src, dst, time. With h [P, d],
a token for each node in each patch where it has an event:

    patches   the W events cut into M groups of equal size (by one at most), in order
    local     in each patch, over the events of a node, both ways:   softmax_u(W_q h_v (W_k [h_u; e; phi(T - t)])) W_v [...]
    pack      tokens of a node in order of time, [nodes seen, M_v at most, d], and which of them are there
    global    attention among these tokens, each plus a code of its patch
    read-out  z_v: the token of the last patch; a node without events has W x_v alone
    logits    MLP [z_u; z_v], or MLP z_v for classes of nodes

T is the time of the last event, phi(t) = cos(w t + b) with w learned, so only differences of times count. Both encoders
are residual with norms in front and a feed-forward part of 4 d. L blocks of local, then global; tokens go from one to
the next (unpacking).

Origin: no code is published. What the paper leaves open is ours: norms in front, biases, w from 1 to 1e-9, `position`
("patch": learned for each patch; "time": phi of its last event's age), hidden width, L and heads. Options switch the
paper's parts off one by one: patches=1, use_global=False, position="none", alternate=False (all local encoders first).
Ours too: pair="product" gives the MLP z_u * z_v beside both, with which it sees at once that two nodes have met, and
random vectors as x, drawn for each batch anew (LinkBatches), so that nodes can be told apart but not be learned by heart.

Proven (there are no published numbers to compare with): predictions do not change with any event at or after them;
patches are a partition in order; packing and unpacking; with one patch and no global part a message-passing network
computed another way; invariance to shifts of time and names of nodes; a first event's colour is found over all patches,
and not without the global part; an edge that recurs is found where the window reaches back to it, and not where it does
not; time linear in W. On the planted stream it is a point or two above EdgeBank (benchmarks/results/link_prediction.md),
and there the global part adds nothing that is sure. Not proven: any result of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class TodyformerConfig:
    node_dim: int = 0  # width of x; 0: nodes have no features
    edge_dim: int = 0  # width of edge_attr
    hidden_dim: int = 100  # d
    time_dim: int = 100  # of phi
    layers: int = 3  # L
    heads: int = 2
    patches: int = 32  # M
    dropout: float = 0.1
    position: str = "patch"  # or "time", "none"
    use_global: bool = True
    alternate: bool = True  # False: all local encoders before all global ones
    readout: str = "last"  # or "mean" of a node's tokens
    head: str = "link"  # or "node"
    pair: str = "concat"  # what the head "link" is given; or "product"
    classes: int = 2  # of the head "node"

    def __post_init__(self) -> None:
        one_of("todyformer", "position", self.position, ("patch", "time", "none"))
        one_of("todyformer", "readout", self.readout, ("last", "mean"))
        one_of("todyformer", "head", self.head, ("link", "node"))
        one_of("todyformer", "pair", self.pair, ("concat", "product"))
        at_least("todyformer", 0, node_dim=self.node_dim, edge_dim=self.edge_dim)
        at_least(
            "todyformer", 1, time_dim=self.time_dim, layers=self.layers, patches=self.patches, classes=self.classes
        )
        divides("todyformer", "heads", self.heads, "hidden_dim", self.hidden_dim)


@dataclass(frozen=True)
class Slots:
    """Where tokens are: one for each node in each patch that has events of it, ordered by node, then by patch."""

    ends: Tensor  # [2, W]: the tokens that an event joins
    node: Tensor  # [P]
    patch: Tensor  # [P]
    row: Tensor  # [P]: of its node among those that have tokens
    place: Tensor  # [P]: among the tokens of its node
    counts: Tensor  # [V]: tokens of each node


def patch_of(events: int, patches: int, device: torch.device | None = None) -> Tensor:
    """[events]: the patch of each. Sizes differ by one at most; with fewer events than patches some have none."""
    return torch.arange(events, device=device) * patches // max(events, 1)


def slots_of(edge_index: Tensor, patch: Tensor, nodes: int, patches: int) -> Slots:
    """edge_index [2, W], patch [W] -> the tokens of the window."""
    keys, ends = torch.unique(edge_index * patches + patch, return_inverse=True)
    node = keys // patches
    counts = node.bincount(minlength=nodes)
    place = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[node]
    return Slots(ends, node, keys % patches, (counts > 0).cumsum(0)[node] - 1, place, counts)


def pack(tokens: Tensor, slots: Slots, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """tokens [P, d] -> [nodes seen, most tokens of a node, d] with `fill` where none is, and where one is, bool."""
    shape = int(slots.row[-1]) + 1, int(slots.counts.max())
    there = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    there = there.index_put((slots.row, slots.place), torch.ones_like(slots.row, dtype=torch.bool))
    packed = tokens.new_full((*shape, tokens.shape[1]), fill).index_put((slots.row, slots.place), tokens)
    return packed, there


def unpack(packed: Tensor, slots: Slots) -> Tensor:
    """[nodes seen, most tokens, d] -> [P, d]."""
    return packed[slots.row, slots.place]


def softmax_at(target: Tensor, logits: Tensor, count: int) -> Tensor:
    """logits [E, heads] -> shares that add up to one among the entries of the same target [E], which is below `count`."""
    where = target[:, None].expand_as(logits)
    largest = logits.new_full((count, logits.shape[1]), -torch.inf).scatter_reduce(0, where, logits.detach(), "amax")
    shares = (logits - largest[target]).exp()
    return shares / torch.zeros_like(largest).index_add(0, target, shares)[target]


class TimeEncoding(nn.Module):
    """phi: ages [...] -> cos(w age + b) [..., time_dim]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(10 ** -torch.linspace(0, 9, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, age: Tensor) -> Tensor:
        return (age[..., None] * self.weight + self.bias).cos()


class FeedForward(nn.Sequential):
    def __init__(self, config: TodyformerConfig) -> None:
        d, dropout = config.hidden_dim, config.dropout
        super().__init__(
            nn.LayerNorm(d),
            nn.Linear(d, 4 * d),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * d, d),
            nn.Dropout(dropout),
        )


class LocalEncoder(nn.Module):
    """Tokens [P, d], the two tokens of each event [2, W], what is known of events [W, e + time_dim] -> [P, d]."""

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__()
        d, self.heads = config.hidden_dim, config.heads
        self.norm = nn.LayerNorm(d)
        self.q, self.kv = nn.Linear(d, d), nn.Linear(d, 2 * d)
        self.kv_event = nn.Linear(
            config.edge_dim + config.time_dim, 2 * d, bias=False
        )  # W_k, W_v of [h; e; phi], cut in two
        self.out, self.dropout = nn.Linear(d, d), nn.Dropout(config.dropout)
        self.mlp = FeedForward(config)

    def forward(self, h: Tensor, ends: Tensor, events: Tensor) -> Tensor:
        y = self.norm(h)
        source, target = ends.flatten(), ends.flip(0).flatten()  # [2 W]: every event both ways
        kv = self.kv(y)[source] + self.kv_event(events).repeat(2, 1)
        k, v = rearrange(kv, "e (two h c) -> two e h c", two=2, h=self.heads)
        q = rearrange(self.q(y), "p (h c) -> p h c", h=self.heads)[target]
        shares = softmax_at(target, (q * k).sum(-1) * q.shape[-1] ** -0.5, len(h))
        gathered = torch.zeros_like(h).index_add(0, target, (shares[..., None] * v).flatten(1))
        h = h + self.dropout(self.out(gathered))
        return h + self.mlp(h)


class GlobalEncoder(nn.Module):
    """Packed tokens [n, m, d], which are there [n, m], at least one in each row -> [n, m, d]."""

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__()
        d, self.heads, self.attn_dropout = config.hidden_dim, config.heads, config.dropout
        self.norm = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.dropout, self.mlp = nn.Dropout(config.dropout), FeedForward(config)

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(h)), "n m (three h c) -> three n h m c", three=3, h=self.heads)
        dropout = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, there[:, None, None], dropout)
        h = h + self.dropout(self.out(rearrange(y, "n h m c -> n m (h c)")))
        return h + self.mlp(h)


@register(
    "todyformer",
    task="link-predict",
    input="events",
    paper="arXiv 2402.05944",
    variants={"todyformer": (811_601, {})},
    small={
        "node_dim": 6,
        "edge_dim": 3,
        "hidden_dim": 16,
        "time_dim": 8,
        "layers": 2,
        "patches": 4,
    },
    untraceable="how many patches a node is in is known only when it runs",
)
class Todyformer(nn.Module):
    """edge_index [2, W], time [W], x [V, node_dim], query [2, B], edge_attr [W, edge_dim] -> logits [B].

    With head="node", query [B] -> logits [B, classes].
    """

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_dim
        self.time = TimeEncoding(config.time_dim)
        self.embed = nn.Linear(config.node_dim, d, bias=False) if config.node_dim else None
        kinds = ("local", "global") if config.use_global else ("local",)
        make = {"local": LocalEncoder, "global": GlobalEncoder}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({kind: make[kind](config) for kind in kinds}) for _ in range(config.layers)
        )
        layers = range(config.layers)
        if config.alternate:
            self.order = [f"{layer}.{kind}" for layer in layers for kind in kinds]
        else:
            self.order = [f"{layer}.{kind}" for kind in kinds for layer in layers]
        if config.use_global and config.position == "patch":
            self.position = nn.Embedding(config.patches, d)
        elif config.use_global and config.position == "time":
            self.position_time = nn.Linear(config.time_dim, d)
        self.norm = nn.LayerNorm(d)
        width = {"link": {"concat": 2 * d, "product": 3 * d}[config.pair], "node": d}[config.head]
        outputs = 1 if config.head == "link" else config.classes
        self.head = nn.Sequential(nn.Linear(width, d), nn.ReLU(), nn.Linear(d, outputs))

    def forward(
        self, edge_index: Tensor, time: Tensor, x: Tensor, query: Tensor, edge_attr: Tensor | None = None
    ) -> Tensor:
        z = self.nodes(edge_index, time, x, edge_attr)
        if self.config.head == "node":
            return self.head(z[query])
        u, v = z[query[0]], z[query[1]]
        joined = (u, v, u * v) if self.config.pair == "product" else (u, v)
        return self.head(torch.cat(joined, -1))[:, 0]

    def nodes(self, edge_index: Tensor, time: Tensor, x: Tensor, edge_attr: Tensor | None = None) -> Tensor:
        """z [V, d]: every node at the end of the window."""
        self._check(edge_index, time, x, edge_attr)
        raw = self.norm.weight.new_zeros(len(x), self.config.hidden_dim) if self.embed is None else self.embed(x)
        if not len(time):
            return self.norm(raw)
        M = self.config.patches
        patch = patch_of(len(time), M, time.device)
        slots = slots_of(edge_index, patch, len(x), M)
        events = self.time((time[-1] - time).to(raw.dtype))  # [W, time_dim]
        if edge_attr is not None:
            events = torch.cat((edge_attr, events), 1)
        code = self._code(time, patch, slots)

        h = raw[slots.node]  # [P, d]
        for name in self.order:
            part = self.blocks.get_submodule(name)
            if isinstance(part, LocalEncoder):
                h = part(h, slots.ends, events)
            else:
                packed, there = pack(h if code is None else h + code, slots)
                h = unpack(part(packed, there), slots)
        return self.norm(self._read_out(h, raw, slots))

    def _code(self, time: Tensor, patch: Tensor, slots: Slots) -> Tensor | None:
        """[P, d]: which patch a token is of."""
        if not self.config.use_global or self.config.position == "none":
            return None
        if self.config.position == "patch":
            return self.position(slots.patch)
        last = time[:1].repeat(self.config.patches).scatter_reduce(0, patch, time, "amax")  # [M]
        age = (time[-1] - last).to(self.norm.weight.dtype)
        return self.position_time(self.time(age))[slots.patch]

    def _read_out(self, h: Tensor, raw: Tensor, slots: Slots) -> Tensor:
        if self.config.readout == "mean":
            mean = torch.zeros_like(raw).index_add(0, slots.node, h) / slots.counts.clamp(min=1)[:, None]
            return torch.where(slots.counts[:, None] > 0, mean, raw)
        last = slots.counts.cumsum(0) - 1
        return torch.where(slots.counts[:, None] > 0, h[last.clamp(min=0)], raw)

    def _check(self, edge_index: Tensor, time: Tensor, x: Tensor, edge_attr: Tensor | None) -> None:
        given = 0 if edge_attr is None else edge_attr.shape[-1]
        if x.shape[1:] != (self.config.node_dim,) or given != self.config.edge_dim:
            raise TersorError(
                f"todyformer takes x [nodes, {self.config.node_dim}] and edge_attr [events, {self.config.edge_dim}], "
                f"not {list(x.shape)} and {'none' if edge_attr is None else list(edge_attr.shape)}"
            )
        if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < len(x):
            low, high = int(edge_index.min()), int(edge_index.max())
            raise TersorError(f"edge_index names nodes {low} to {high}, x has nodes 0 to {len(x) - 1}")
        if len(time) > 1 and bool((time[1:] < time[:-1]).any()):
            place = int((time[1:] < time[:-1]).nonzero()[0])
            raise TersorError(
                f"event {place + 1} is at time {time[place + 1].item():g}, before event {place} at "
                f"{time[place].item():g}; sort the events by time"
            )

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config, events, nodes = self.config, 24, 10
        inputs = {
            "edge_index": torch.stack(
                (torch.randint(nodes // 2, (events,)), torch.randint(nodes // 2, nodes, (events,)))
            ),
            "time": torch.rand(events).cumsum(0),
            "x": torch.randn(nodes, config.node_dim),
            "query": torch.randint(nodes, (2, batch_size) if config.head == "link" else (batch_size,)),
        }
        if config.edge_dim:
            inputs["edge_attr"] = torch.randn(events, config.edge_dim)
        return inputs
