"""How long a job will take, and how much memory and disk: said before its first block.

Everything that takes time is measured on the user's machine, on a small scale: the first pass has run the model on the probe, a
layer of each method is solved, a Hessian is gathered. What is counted are tokens, passes and numbers (the functions below).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from tersor.calibrate.activations import Activations
from tersor.calibrate.batches import Batch
from tersor.calibrate.draws import PROBE, drawing
from tersor.calibrate.hessian import Hessian
from tersor.calibrate.lockstep import Call
from tersor.calibrate.routing import Routing
from tersor.calibrate.statistics import is_expert
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import torch_dtype
from tersor.checkpoint.writer import SINGLE_FILE_LIMIT
from tersor.compress.plan import Plan
from tersor.compress.walk import Prepared
from tersor.devices import memory_now, peak_memory
from tersor.errors import TersorError
from tersor.formats.grid import Stored
from tersor.layers.linear_map import LinearMap, matrix_shape
from tersor.methods.block import STATISTICS_MEMORY, Block
from tersor.methods.method import BlockMethod

PASSES = 3.5  # runs of a block of a LLaMA under GPTQ: statistics (true-sequential ones stop early) and outputs
HESSIAN_BYTES = 12  # for each number of a Hessian: its sum in float64, and the mean in float32
COMPARED = 2  # where the original model runs too, passes and waiting samples are twice as many
WORTH_SAYING = 30  # seconds that a job still takes
SOLVER_COPIES = 6  # of a Hessian and of a weight, held while a layer is solved
REHEARSED, FEW_ROWS, MORE_ROWS = 256, 64, 256  # size of the layers that are solved for practice: inputs, outputs
ALL_OUTPUTS = 3  # of the probe: the original's, the compressed model's, and those of what was written
DOUBLES = 5  # of a row of the probe's outputs, in float64, while it is compared


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    seconds: float
    memory: int  # bytes, with what the process holds already
    disk: int  # bytes at most: the result, and the blocks that it is put together from

    def text(self) -> str:
        memory, disk = f"{self.memory / 1e9:.1f} GB of memory", f"{self.disk / 1e9:.2f} GB of disk"
        return f"forecast: {_duration(self.seconds)}, {memory}, {disk}"


def by_first_block(seconds: float, left: int) -> str | None:
    """What a job says of the time that it still takes, once it solved its first block in so many seconds; None where that is too
    short to be said. left: blocks that are not done yet."""
    return f"by the first block: {_duration(seconds * left)} to go" if seconds * left > WORTH_SAYING else None


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{max(seconds, 1):.0f} s"


def forecast(
    lazy: LazyModel, first: Prepared, device: torch.device, activations: str, stored: Stored | None = None
) -> Forecast:
    """It assumes that every token passes through every layer. first: what the first pass showed. stored: what the file keeps of a
    grid."""
    plan, probe, batches = first.plan, first.probe, first.batches
    tokens = sum(_tokens(batch) for batch in batches)
    streams = COMPARED if any(method.compares for method in plan.methods.values()) else 1
    runs, gathered = _times_of(first, streams, tokens, device, lazy.dtype)
    widest = max((matrix_shape(each)[1] for each in plan.all_linears().values()), default=1)
    rates = {
        method: rehearsal(method, device, lazy.dtype, stored, columns=min(widest, REHEARSED))
        for method in dict.fromkeys(plan.methods.values())
    }
    products = products_per_second(device, torch.float32)
    solving = sum(
        solving_time(*matrix_shape(found), rates[plan.methods[name]], products)
        for linears in plan.linears.values()
        for name, found in linears.items()
    )
    size, result = lazy.checkpoint.size(), size_of_result(lazy, plan)
    loading = probe.cost.loading if probe is not None else 0.0
    files = loading * (1 + 2 * result / max(size, 1))  # the model again; the result is written, and read back
    held = memory_now(device) + solving_memory(plan)
    if probe is not None:
        if activations == "device" or device.type == activations:
            held += streams * waiting_memory(
                probe.cost.arguments, _shape_of(probe.batch), [_shape_of(b) for b in batches]
            )
        held = max(held, memory_now(device) + comparing_memory(probe.before))
    return Forecast(
        seconds=runs + gathered + solving + files,
        memory=max(peak_memory(device), held),
        disk=2 * result if result <= SINGLE_FILE_LIMIT else result,
    )


def _times_of(
    first: Prepared, streams: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds to run the model, and to gather its Hessians."""
    probe, plan = first.probe, first.plan
    if probe is None:
        return 0.0, 0.0
    share = tokens / max(1, _tokens(probe.batch))
    usual = median(probe.cost.seconds.values())
    runs = sum(probe.cost.seconds.values())  # the probe goes through the compressed model, and through what was written
    runs += sum(min(each, 2 * usual) for each in probe.cost.seconds.values())
    gathered, adding = 0.0, dict[int, float]()
    for block, linears in plan.linears.items():
        groups = groups_of(linears, probe.cost.inputs.get(block, []))
        seconds = min(probe.cost.seconds.get(block, usual), 2 * usual)  # the first one also warms up
        if tokens and linears:
            runs += share * streams * seconds * (1 + passes_of(groups, linears))
        for group in groups if tokens else ():
            width = matrix_shape(linears[group[0]])[1]
            if width not in adding:
                adding[width] = gathering_time(width, max(1, tokens // len(first.batches)), device, dtype)
            gathered += streams * len(first.batches) * adding[width]
    return runs, gathered


def groups_of(linears: Mapping[str, LinearMap], seen: Sequence[Sequence[str]]) -> list[list[str]]:
    """The maps of a block that have a Hessian, in the order in which they run; those of one input together. seen: the same of all
    maps that were watched; another one is alone."""
    maps = [name for name, each in linears.items() if not isinstance(each, nn.Embedding)]
    groups = [[name for name in group if name in maps] for group in seen]
    watched = {name for group in seen for name in group}
    return [*filter(None, groups), *([name] for name in maps if name not in watched)]


def passes_of(groups: Sequence[Sequence[str]], linears: Mapping[str, LinearMap]) -> float:
    """Runs of a block that its statistics take: one for each group, which ends where the group has its input."""
    work = [sum(rows * columns for rows, columns in (matrix_shape(linears[n]) for n in group)) for group in groups]
    return sum(sum(work[:n]) for n in range(len(work))) / max(1, sum(work))


def gathering_time(width: int, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds to add a sample to a Hessian: measured at REHEARSED columns at most."""
    columns = min(width, REHEARSED)
    hessian, x = Hessian(columns, device=device), torch.randn(tokens, columns, device=device).to(dtype)
    hessian.add(x, 1)
    started = _now(device)
    hessian.add(x, 1)
    return (_now(device) - started) * (width / columns) ** 2


def rehearsal(
    method: BlockMethod, device: torch.device, dtype: torch.dtype, stored: Stored | None, *, columns: int = REHEARSED
) -> tuple[float, float]:
    """Seconds a column, and seconds a number more, that a method takes to solve a layer. Two small ones are solved, of random
    numbers and so many columns, in whole groups. Nothing where the method takes none such."""
    grids = method.quantization()
    group = grids.group_size if grids is not None and grids.group_size > 0 else 1
    columns = group * -(-columns // group)

    def solve(rows: int) -> float:
        linear = nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)
        x = torch.randn(1, 2 * columns, columns, device=device).to(dtype)
        call = Call(0, (0,), (x,), {}, linear, Activations("device"))
        outputs = {"layer": torch.eye(rows)} if method.weighs_outputs else {}
        block = Block("", linear, {"layer": linear}, [call], stored, torch.float32, Routing(), outputs=outputs)
        started = _now(device)
        method.compress_block(block)
        return _now(device) - started

    try:
        with torch.no_grad(), drawing(PROBE):  # the job's own random numbers stay as they are
            solve(FEW_ROWS)  # warms up
            few, more = solve(FEW_ROWS), solve(MORE_ROWS)
    except TersorError:
        return 0.0, 0.0
    number = max(0.0, more - few) / (MORE_ROWS - FEW_ROWS) / columns
    return max(0.0, few / columns - FEW_ROWS * number), number


def solving_time(rows: int, columns: int, rate: tuple[float, float], products: float) -> float:
    """Seconds to solve a layer by its method's rehearsal: each column, each number, and where the layer is wider than that was,
    the products that grow faster."""
    wider = max(0, columns - REHEARSED) if any(rate) else 0
    return columns * (rate[0] + rows * rate[1]) + wider * columns * (rows + columns) / products


def waiting_memory(arguments: Sequence[Tensor], probe: tuple[int, int], samples: Sequence[tuple[int, int]]) -> int:
    """Bytes of what waits in front of a block and behind it, over all samples. arguments: of a block, on the probe. probe,
    samples: (rows, length) of each. An axis as long as the probe is as long as the sample; the first has a place for each row."""
    rows, length = probe
    found = 0
    for their_rows, theirs in samples:
        for n, each in enumerate(arguments):
            size = each.element_size()
            for axis, extent in enumerate(each.shape):
                size *= their_rows if axis == 0 and extent == rows else theirs if axis and extent == length else extent
            found += size * (2 if n == 0 else 1)  # the first is what the block changes: input and output
    return found


def solving_memory(plan: Plan) -> int:
    """Bytes that are held at most while a block is solved: copies of a Hessian and a weight, or the Hessians of experts."""
    most = 0
    for linears in plan.linears.values():
        experts = 0
        for name, found in linears.items():
            rows, width = matrix_shape(found)
            squares = 0 if isinstance(found, nn.Embedding) else width**2  # an embedding has no Hessian
            most = max(most, SOLVER_COPIES * 4 * (squares + rows * width))
            experts += HESSIAN_BYTES * width**2 if is_expert(name) else 0
        most = max(most, min(experts, STATISTICS_MEMORY))
    return most


def comparing_memory(outputs: Tensor | None) -> int:
    """Bytes that the probe's outputs take in the end, beside the original's, which are there already."""
    if outputs is None:
        return 0
    rows = max(1, len(outputs))
    return (ALL_OUTPUTS - 1) * outputs.numel() * outputs.element_size() + DOUBLES * 8 * outputs.numel() // rows


def size_of_result(lazy: LazyModel, plan: Plan) -> int:
    """Bytes on disk."""
    original = torch_dtype(lazy.checkpoint.config).itemsize
    change = 0
    for linears in plan.linears.values():
        for name, found in linears.items():
            rows, width = matrix_shape(found)
            grids = plan.methods[name].quantization()
            bits, group = (grids.bits, grids.group_size) if grids else (8 * original, -1)
            packed = rows * (width * bits + (16 + bits) * (1 if group == -1 else width // group)) // 8
            change += packed - original * rows * width
    return lazy.checkpoint.size() + change


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _shape_of(batch: Batch) -> tuple[int, int]:
    """Rows and length of a sample of text; of other inputs rows, and one."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids.shape[0], ids.shape[1]
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
    return (1 if first is None else len(first)), 0


def _tokens(batch: Batch) -> int:
    """Positions of a sample: tokens of text; for other inputs the rows of the first tensor's last two axes."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.numel()
    first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return 1 if first is None else max(1, first.numel() // first.shape[-1])


def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second, measured on a matmul large enough to keep the device busy."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    float(torch.mm(a, a)[0, 0])  # waits for a GPU, here as below
    started, runs = time.perf_counter(), 4
    for _ in range(runs):
        product = torch.mm(a, a)
    float(product[0, 0])
    return runs * size**3 / max(time.perf_counter() - started, 1e-6)
