"""A model whose parts are in memory only while they are in use.

The module tree is built without weights (meta device). `load` reads the tensors of one module from the shards; published keys are
renamed and converted as transformers does it. `release` lets them go again. Quantized layers of every layout are read either as
dense layers, for walking through a model block by block, or as packed layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.key_map import KeyMap, last_number
from tersor.checkpoint.quantization_config import read_config
from tersor.checkpoint.skeleton import build_skeleton
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint, torch_dtype
from tersor.checkpoint.tree import (
    forget_weights,
    get_tensor,
    initialize_buffer,
    set_tensor,
    state_of,
    tied_parameters,
)
from tersor.devices import DType, name_of_dtype
from tersor.errors import BrokenWeightError, TersorError
from tersor.formats.layout import Header, QuantizationConfig
from tersor.formats.layouts import PACKED_SUFFIXES, layout_of
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import LinearMap, matrix_shape, packable_maps, put_packed
from tersor.layers.quantized_linear import place_packed


class LazyModel:
    """`module` is the whole tree. Parts that are not loaded have their parameters on the meta device."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu", packed: bool = False
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.packed = checkpoint, dtype, torch.device(device), packed
        self.module = build_skeleton(checkpoint, dtype)
        self._computed = forget_weights(self.module)
        for each in self.module.modules():
            for name, buffer in each._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    each._buffers[name] = buffer.to(self.device)
        self.quantization = read_config(checkpoint.directory, checkpoint.config)
        self._keys = KeyMap(self.module)
        self._ties = tied_parameters(self.module)
        self.maps = packable_maps(self.module)  # every linear map and embedding, by name
        self.keys_of: dict[str, list[str]] = defaultdict(list)  # the published tensors that make up each parameter
        self.quantized: dict[
            str, list[str]
        ] = {}  # the published names of each packed map; several where layers are fused
        self.unknown: list[str] = []  # tensors that the module tree has no place for
        self.untied_head = False  # whether the checkpoint holds a head of its own, against its config
        self._sort_keys()
        self._check_nothing_is_missing()
        self._keep_both_of_untied()
        self._check_packed()
        if packed:
            self._make_room_for_packed()

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that the checkpoint says its weights have."""
        return torch_dtype(self.checkpoint.config)

    def load(self, module: nn.Module) -> None:
        """Bring every parameter and persistent buffer of `module` into memory."""
        prefix, before = self._name_of(module), {id(tensor) for _, tensor in state_of(module, "") if not tensor.is_meta}
        names = [name for name, tensor in state_of(module, prefix) if tensor.is_meta]
        packed = [linear for linear in self.quantized if _is_under(linear, prefix)]
        apart = {self.parameter_of(linear) for linear in packed}
        self._load_plain([self._ties.get(name, name) for name in names if name not in apart])
        if not self.packed:  # packed layers were read when room was made for them
            self._load_dequantized(packed)
        self._tie()
        for name, parameter in module.named_parameters(prefix=prefix):
            if id(parameter) not in before:
                check_finite(name, parameter)

    def release(self, module: nn.Module) -> None:
        """Let the tensors of `module` go; its parameters are on the meta device again."""
        prefix = self._name_of(module)
        for name, tensor in state_of(module, prefix):
            for each in {name, self._ties.get(name, name)}:
                set_tensor(self.module, each, torch.empty_like(tensor, device="meta"))
        self._tie()

    def load_rest(self, units: Iterable[nn.Module]) -> None:
        """Load what lies outside `units`: class tokens, position tables and the like."""
        inside = {id(tensor) for unit in units for _, tensor in state_of(unit, "")}
        names = [name for name, tensor in state_of(self.module, "") if tensor.is_meta and id(tensor) not in inside]
        self._load_plain(names)
        self._tie()

    def load_all(self) -> nn.Module:
        self.load(self.module)
        return self.module

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json, corrected where it denies that the checkpoint has a head of its own."""
        found = self.checkpoint.config
        if not self.untied_head:
            return found
        corrected = {**found, "tie_word_embeddings": False}
        for name, each in found.items():
            if isinstance(each, dict) and each.get("tie_word_embeddings"):
                corrected[name] = {**each, "tie_word_embeddings": False}
        return corrected

    def bytes_of(self, module: nn.Module) -> int:
        """Memory that `module` takes once loaded."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in state_of(module, ""))

    def parameter_of(self, linear: str) -> str:
        """The parameter that holds a linear map's weight: an expert's is a stack."""
        return linear.rpartition(".")[0] if isinstance(self.maps[linear], ExpertMap) else f"{linear}.weight"

    def is_converted(self, name: str) -> bool:
        """Whether a parameter may be made of the checkpoint's tensors by more than renaming."""
        return any(pattern in name for each in self._keys.converters for pattern in each.target_patterns)

    def keys_of_map(self, linear: str) -> list[str]:
        """The checkpoint's tensors that make up this map's weight. Where experts lie in one tensor, it is that of the whole
        stack."""
        keys = self.keys_of.get(self.parameter_of(linear), [])
        return [key for key in keys if len(keys) == 1 or self._belongs(key, linear)]

    def pieces(self, linear: str) -> list[tuple[str, int]]:
        """The published layers that a map consists of, each with its number of outputs; several where transformers fuses them.

        Experts that are published in one stack are called `<experts>.<number>.<stack>`, as in other tools. Where the stack is
        published under another name than the module's, the module's name is taken.
        """
        found, keys = self.maps[linear], self.keys_of_map(linear)
        out_features = matrix_shape(found)[0]
        if not isinstance(found, ExpertMap):
            published = len(keys) == 1 and keys[0].endswith(".weight")
            return [(keys[0].removesuffix(".weight") if published else linear, out_features)]
        if named := self.named_pieces(linear):
            return named
        published = len(keys) == 1 and keys[0].rpartition(".")[2] == found.stack
        owner = keys[0].rpartition(".")[0] if published else linear.rsplit(".", 2)[0]
        return [(f"{owner}.{found.index}.{found.stack}", out_features)]

    def named_pieces(self, linear: str) -> list[tuple[str, int]]:
        """The pieces of an expert whose parts are published under names of their own; empty where they are not."""
        found, keys = self.maps[linear], self.keys_of_map(linear)
        if not isinstance(found, ExpertMap) or found.transposed or not all(key.endswith(".weight") for key in keys):
            return []
        shapes = [self.checkpoint.shape(key) for key in keys]
        if any(len(shape) != 2 for shape in shapes) or sum(rows for rows, _ in shapes) != matrix_shape(found)[0]:
            return []
        return [(key.removesuffix(".weight"), rows) for key, (rows, _) in zip(keys, shapes, strict=True)]

    def _belongs(self, key: str, linear: str) -> bool:
        found = self.maps[linear]
        return not isinstance(found, ExpertMap) or last_number(key) == found.index

    def _sort_keys(self) -> None:
        known = dict(state_of(self.module, ""))
        suffixes = PACKED_SUFFIXES if self.quantization else ()
        packed: dict[str, dict[int, str]] = defaultdict(dict)
        plain: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for key in self.checkpoint.shard_of:
            stem, _, suffix = key.rpartition(".")
            plain_weight = suffix == "weight" and f"{stem}.weight_scale" not in self.checkpoint.shard_of
            linear, part = self._packed_map(stem) if suffix in suffixes and not plain_weight else (None, 0)
            name, order = self._keys.runtime_name(key)
            if linear is not None:
                packed[linear][part] = stem
            elif name in known:
                plain[name].append((order, key))
            else:
                self.unknown.append(key)
        self.quantized = {linear: [stem for _, stem in sorted(parts.items())] for linear, parts in packed.items()}
        self.keys_of.update({name: [key for _, key in sorted(ordered)] for name, ordered in plain.items()})

    def _packed_map(self, stem: str) -> tuple[str | None, int]:
        """The linear map that a published quantized layer belongs to, and which part of it the layer is."""
        name, part = self._keys.runtime_name(f"{stem}.weight")
        fused = re.fullmatch(r"(.+)\.(\d+)\.([^.]+)", stem)
        candidates = [(name.removesuffix(".weight"), part), (f"{name}.{last_number(stem)}", part)]
        if fused is not None:
            stack, _ = self._keys.runtime_name(f"{fused[1]}.{fused[3]}")
            candidates.append((f"{stack}.{fused[2]}", 0))
        return next(((linear, n) for linear, n in candidates if linear in self.maps), (None, 0))

    def _check_nothing_is_missing(self) -> None:
        here = (
            set(self.keys_of)
            | {self.parameter_of(each) for each in self.quantized}
            | self._keys.converted(self.keys_of)
        )
        # A tie whose source is absent but whose target is there runs the other way.
        for target, source in list(self._ties.items()):
            if source not in here and target in here:
                del self._ties[target]
                self._ties = {t: (target if s == source else s) for t, s in self._ties.items()} | {source: target}
        missing = [name for name, _ in state_of(self.module, "") if self._ties.get(name, name) not in here]
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        missing = [name for name in missing if name in parameters or not self._initialize_buffer(name)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise TersorError(f"{self.checkpoint.directory} lacks the tensor {missing[0]}{more}")

    def _initialize_buffer(self, name: str) -> bool:
        """Fill a persistent buffer that older checkpoints lack: with what the constructor or the model's own initialization
        computes. False where neither does."""
        if name not in self._computed:
            return initialize_buffer(self.module, name)
        set_tensor(self.module, name, self._computed[name].to(self.device))
        return True

    def _keep_both_of_untied(self) -> None:
        """Untie two tensors that the config calls one where the checkpoint holds different values for them."""
        for target, source in list(self._ties.items()):
            if self._is_stored(target) and self._is_stored(source) and not self._are_equal(target, source):
                del self._ties[target]
                is_head = self._is_head(target)
                set_tensor(self.module, target, get_tensor(self.module, source).detach().clone())
                declared = getattr(self.module, "all_tied_weights_keys", None)
                if isinstance(declared, dict):
                    declared.pop(target, None)
                if is_head:
                    self.untied_head = True
                    _say_untied(self.module.config)

    def _is_stored(self, name: str) -> bool:
        return name in self.keys_of or any(self.parameter_of(each) == name for each in self.quantized)

    def _is_head(self, name: str) -> bool:
        head: Any = getattr(self.module, "get_output_embeddings", lambda: None)()
        return head is not None and self.module.get_submodule(name.rpartition(".")[0]) is head

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether the checkpoint holds the same values for two parameters."""
        keys = self.keys_of.get(one, []), self.keys_of.get(other, [])
        if len(keys[0]) != 1 or len(keys[1]) != 1:
            return False
        with self.checkpoint.tensors([keys[0][0], keys[1][0]]) as slices:
            a, b = slices[keys[0][0]], slices[keys[1][0]]
            if list(a.get_shape()) != list(b.get_shape()) or a.get_dtype() != b.get_dtype():
                return False
            return torch.equal(a[...], b[...])

    def _check_packed(self) -> None:
        """Raise TersorError where a packed layer's tensors are not what the quantization config says."""
        stems = [(stem, linear) for linear, parts in self.quantized.items() for stem in parts]
        in_shard: dict[Path, list[str]] = defaultdict(list)
        for key in (f"{stem}.{suffix}" for stem, _ in stems for suffix in PACKED_SUFFIXES):
            if key in self.checkpoint.shard_of:
                in_shard[self.checkpoint.shard_of[key]].append(key)
        headers: dict[str, Header] = {}
        for keys in in_shard.values():  # one file at a time: all together may not fit in memory
            with self.checkpoint.tensors(keys) as slices:
                headers |= {key: (piece.get_dtype(), tuple(piece.get_shape())) for key, piece in slices.items()}
        for stem, linear in stems:
            found, config = self.maps[linear], self.quantization
            own = None if config is None else config.for_layer(stem, linear, classes=classes_of(found))
            check_layer(stem, headers, matrix_shape(found)[1], own)

    def _make_room_for_packed(self) -> None:
        """Replace every dense layer that is stored packed, so that its dense weight is never allocated."""
        for name in self.quantized:
            if isinstance(self.maps[name], nn.Embedding) and f"{name}.weight" in {*self._ties, *self._ties.values()}:
                raise TersorError(
                    f"{self.checkpoint.directory}: {name} is packed although its weight is tied to another, "
                    "which tersor does not read"
                )
        packed = {linear: self.read_quantized(linear).to(self.device) for linear in self.quantized}
        place_packed(self.module, self.maps, packed)

    def _load_plain(self, names: Iterable[str]) -> None:
        wanted = [key for name in dict.fromkeys(self._keys.sources(names)) for key in self.keys_of.get(name, ())]
        if not wanted:
            return
        with self.checkpoint.tensors(wanted) as slices:
            self._keys.load(slices, self.device, self.dtype)

    def _load_dequantized(self, linears: Iterable[str]) -> None:
        for linear in linears:
            name, found = self.parameter_of(linear), self.maps[linear]
            if get_tensor(self.module, name).is_meta:
                set_tensor(self.module, name, torch.empty_like(get_tensor(self.module, name), device=self.device))
            put_packed(found, self.read_quantized(linear).to(self.device), self.dtype)

    def read_quantized(self, linear: str) -> QuantizedWeight:
        """The packed weight of one of `quantized`, on the CPU."""
        config = self.quantization
        assert config is not None
        found = self.maps[linear]
        out_features, in_features = matrix_shape(found)
        parts = []
        for stem in self.quantized[linear]:
            present = [s for s in PACKED_SUFFIXES if f"{stem}.{s}" in self.checkpoint.shard_of]
            read = self.checkpoint.read(f"{stem}.{suffix}" for suffix in present)
            tensors = {suffix: read[f"{stem}.{suffix}"] for suffix in present}
            parts.append(
                read_layer(stem, tensors, in_features, config.for_layer(stem, linear, classes=classes_of(found)))
            )
        weight = parts[0] if len(parts) == 1 else QuantizedWeight.stack_rows(parts)
        if weight.out_features != out_features:
            stems = ", ".join(self.quantized[linear])
            raise TersorError(f"{stems} has {weight.out_features} outputs; the model's layer has {out_features}")
        return weight

    def _tie(self) -> None:
        for target, source in self._ties.items():
            owner, _, leaf = target.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, get_tensor(self.module, source))

    def _name_of(self, module: nn.Module) -> str:
        for name, each in self.module.named_modules():
            if each is module:
                return str(name)
        raise ValueError(f"{type(module).__name__} is not part of this model")


def check_layer(name: str, headers: dict[str, Header], in_features: int, config: QuantizationConfig | None) -> None:
    """Raise TersorError where the headers of one packed layer, published as `name`, do not go with what holds for it."""
    if config is None:
        raise TersorError(f"{name} is packed, and the checkpoint has no quantization config")
    found = {s: headers[f"{name}.{s}"] for s in PACKED_SUFFIXES if f"{name}.{s}" in headers}
    layout_of(config, found).check(name, found, in_features, config)


def read_layer(name: str, tensors: dict[str, Tensor], in_features: int, config: QuantizationConfig) -> QuantizedWeight:
    """One quantized layer from its tensors, in any format. name: its published name. tensors: by suffix. config: what holds for
    it."""
    weight = layout_of(config, tensors).read(name, tensors, in_features, config)
    assert isinstance(weight, QuantizedWeight)  # every format that packs gives one
    return weight


def classes_of(found: LinearMap) -> list[str]:
    """The class names that a quantization config may use for this kind of layer: of its class and of all base classes."""
    return ["Linear"] if isinstance(found, ExpertMap) else [each.__name__ for each in type(found).__mro__]


def lazily(model: Openable | LazyModel) -> LazyModel:
    """The tree of a model in float32, with nothing loaded yet; a LazyModel is given back as it is."""
    return model if isinstance(model, LazyModel) else LazyModel(open_checkpoint(model), dtype=torch.float32)


def compute_dtype(checkpoint: Checkpoint, device: torch.device | str, dtype: DType = "auto") -> torch.dtype:
    """The dtype to run in. "auto": float32 on a CPU, where half precision is slower and coarser; else the checkpoint's own."""
    dtype = name_of_dtype(dtype)
    if dtype != "auto":
        known = {
            "float16": torch.float16,
            "bfloat16": torch.bfloat16,
            "float32": torch.float32,
            "float64": torch.float64,
        }
        if dtype not in known:
            raise TersorError(f"dtype {dtype!r} is not one of auto, {', '.join(known)}")
        return known[dtype]
    return torch.float32 if torch.device(device).type == "cpu" else torch_dtype(checkpoint.config)


def dtypes_to_try(
    checkpoint: Checkpoint, device: torch.device | str, dtype: DType, *, earlier: Callable[[], str | None]
) -> list[torch.dtype]:
    """The dtypes to run in, each when the model overflows the one before: float32 after a float16 that the user did not ask for.

    earlier: gives the dtype that an unfinished run of the same job used, in words; what overflowed then is not tried again.
    """
    first = compute_dtype(checkpoint, device, dtype)
    if dtype != "auto" or first != torch.float16:
        return [first]
    return [torch.float32] if earlier() == str(torch.float32) else [first, torch.float32]


def check_finite(name: str, weight: Tensor) -> None:
    """Raise BrokenWeightError where a weight holds NaN or Inf. The sum, which is fast, tells, unless it overflows itself."""
    if not weight.is_floating_point() or weight.is_meta:
        return
    if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise BrokenWeightError(f"the weight {name} is not finite (NaN or Inf)")


def _say_untied(config: Any) -> None:
    """Make a model's config say that embedding and head are two tensors, as a checkpoint saved from it will hold both."""
    for each in (config, getattr(config, "get_text_config", lambda: config)()):
        if getattr(each, "tie_word_embeddings", None):
            each.tie_word_embeddings = False


def _is_under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}.")
