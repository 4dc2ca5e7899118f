"""A model of which only the parts in use are in memory.

The module tree is built without weights (meta device); `load` reads the tensors of one module from the shards, through
transformers' own renaming and conversion of published keys, and `release` lets them go again. Quantized layers are read from
every layout, as plain dense layers (for walking through a model block by block) or as packed layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.quantization_config import QuantizationConfig, read_config
from tersor.checkpoint.source import Checkpoint, torch_dtype
from tersor.errors import TersorError
from tersor.formats.layouts import COMPRESSED_SUFFIXES, GPTQ_SUFFIXES, read_awq, read_compressed, read_gptq
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.linear_map import is_conv1d
from tersor.layers.quantized_linear import QuantizedConv2d, QuantizedLinear, quantized_layer


class LazyModel:
    """`module` is the whole tree; parts that are not loaded have parameters on the meta device.

    keys_of: the checkpoint's tensor names that make up each parameter; quantized: the name under which each packed layer lies.
    unknown: tensors that the module tree has no place for.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu", packed: bool = False
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.packed = checkpoint, dtype, torch.device(device), packed
        self.module = build_skeleton(checkpoint, dtype)
        for each in self.module.modules():
            for name, buffer in each._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    each._buffers[name] = buffer.to(self.device)
        self.quantization = read_config(checkpoint.directory, checkpoint.config)
        self._keys = _KeyMap(self.module)
        self._ties = _tied_parameters(self.module)
        self.keys_of: dict[str, list[str]] = defaultdict(list)
        self.quantized: dict[str, str] = {}
        self.unknown: list[str] = []
        self._sort_keys()
        self._check_nothing_is_missing()
        if packed:
            self._make_room_for_packed()

    def load(self, module: nn.Module) -> None:
        """Bring every parameter and persistent buffer of `module` into memory."""
        prefix = self._name_of(module)
        names = [name for name, tensor in _state(module, prefix) if tensor.is_meta]
        packed = [path for path in self.quantized if _is_under(path, prefix)]
        dense = {f"{path}.weight" for path in packed}
        self._load_plain([self._ties.get(name, name) for name in names if name not in dense])
        for path in packed:
            self._load_quantized(path)
        self._tie()

    def release(self, module: nn.Module) -> None:
        """Let the tensors of `module` go; its parameters are on the meta device again."""
        prefix = self._name_of(module)
        for name, tensor in _state(module, prefix):
            for each in {name, self._ties.get(name, name)}:
                _set(self.module, each, torch.empty_like(tensor, device="meta"))
        self._tie()

    def load_rest(self, units: Iterable[nn.Module]) -> None:
        """Load what lies outside `units`: class tokens, position tables and the like."""
        inside = {id(tensor) for unit in units for _, tensor in _state(unit, "")}
        names = [name for name, tensor in _state(self.module, "") if tensor.is_meta and id(tensor) not in inside]
        self._load_plain(names)
        self._tie()

    def load_all(self) -> nn.Module:
        self.load(self.module)
        return self.module

    def bytes_of(self, module: nn.Module) -> int:
        """Memory that `module` takes once loaded."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in _state(module, ""))

    def _sort_keys(self) -> None:
        known = dict(_state(self.module, ""))
        suffixes = (*GPTQ_SUFFIXES, *COMPRESSED_SUFFIXES) if self.quantization else ()
        for key in self.checkpoint.shard_of:
            stem, _, suffix = key.rpartition(".")
            if suffix in suffixes:
                path = self._keys.runtime_name(f"{stem}.weight").removesuffix(".weight")
                if f"{path}.weight" in known:
                    self.quantized[path] = stem
                    continue
            name = self._keys.runtime_name(key)
            if name in known:
                self.keys_of[name].append(key)
            else:
                self.unknown.append(key)

    def _check_nothing_is_missing(self) -> None:
        here = set(self.keys_of) | {f"{path}.weight" for path in self.quantized} | self._keys.converted(self.keys_of)
        # A tie whose source is absent but whose target is there runs the other way.
        for target, source in list(self._ties.items()):
            if source not in here and target in here:
                del self._ties[target]
                self._ties = {t: (target if s == source else s) for t, s in self._ties.items()} | {source: target}
        missing = [
            name
            for name, tensor in _state(self.module, "")
            if self._ties.get(name, name) not in here and tensor.is_meta
        ]
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        missing = [name for name in missing if name in parameters or not _initialize_buffer(self.module, name)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise TersorError(f"{self.checkpoint.directory} lacks the tensor {missing[0]}{more}")

    def _make_room_for_packed(self) -> None:
        """Replace every dense layer that is stored packed, so that its dense weight is never allocated."""
        for path in list(self.quantized):
            layer = self.module.get_submodule(path)
            weight = self._read_quantized(path, *_matrix_shape(layer))
            self.module.set_submodule(path, quantized_layer(layer, weight.to(self.device)))

    def _load_plain(self, names: Iterable[str]) -> None:
        wanted = [key for name in dict.fromkeys(self._keys.sources(names)) for key in self.keys_of.get(name, ())]
        if not wanted:
            return
        with self.checkpoint.tensors(wanted) as slices:
            self._keys.load(slices, self.device, self.dtype)

    def _load_quantized(self, path: str) -> None:
        layer = self.module.get_submodule(path)
        if isinstance(layer, QuantizedLinear | QuantizedConv2d):
            return  # read when room was made for it
        weight = self._read_quantized(path, *_matrix_shape(layer)).to(self.device).dequantize(self.dtype)
        assert isinstance(layer.weight, Tensor)
        _set(
            self.module,
            f"{path}.weight",
            weight.t().contiguous() if is_conv1d(layer) else weight.view(layer.weight.shape),
        )

    def _read_quantized(self, path: str, out_features: int, in_features: int) -> QuantizedWeight:
        config, stem = self.quantization, self.quantized[path]
        assert config is not None
        present = [s for s in (*GPTQ_SUFFIXES, *COMPRESSED_SUFFIXES) if f"{stem}.{s}" in self.checkpoint.shard_of]
        read = self.checkpoint.read(f"{stem}.{suffix}" for suffix in present)
        tensors = {suffix: read[f"{stem}.{suffix}"] for suffix in present}
        weight = read_layer(stem, tensors, in_features, config)
        if weight.out_features != out_features:
            raise TersorError(f"{stem} has {weight.out_features} outputs; the model's layer has {out_features}")
        return weight

    def _tie(self) -> None:
        for target, source in self._ties.items():
            owner, _, leaf = target.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, _get(self.module, source))

    def _name_of(self, module: nn.Module) -> str:
        for name, each in self.module.named_modules():
            if each is module:
                return str(name)
        raise ValueError(f"{type(module).__name__} is not part of this model")


def read_layer(name: str, tensors: dict[str, Tensor], in_features: int, config: QuantizationConfig) -> QuantizedWeight:
    """One quantized layer from its tensors by suffix, whichever layout they are in."""
    bits, group_size = config.bits, config.group_size
    if "weight_packed" in tensors:
        return read_compressed(name, tensors, in_features, bits=bits, group_size=group_size)
    if config.layout == "awq":
        return read_awq(name, tensors, in_features, group_size=group_size)
    return read_gptq(
        name,
        tensors,
        in_features,
        bits=bits,
        group_size=group_size,
        v2=config.layout == "gptq_v2",
        sym=config.sym,
        whole_word_zeros=config.whole_word_zeros,
    )


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The module tree that a config.json describes, without weights, in eval mode."""
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if "tersor_model" in config:
        from tersor import models

        with torch.device("meta"):
            return models.create(config.pop("tersor_model"), **config).to(dtype).eval()
    import transformers

    architectures = config.get("architectures") or []
    kind = getattr(transformers, architectures[0], None) if architectures else None
    if kind is None:
        name = architectures[0] if architectures else "none"
        raise TersorError(
            f"{checkpoint.directory}: config.json names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have"
        )
    try:
        parsed = kind.config_class.from_pretrained(checkpoint.directory)
        if hasattr(parsed, "quantization_config"):
            del parsed.quantization_config
        with torch.device("meta"):
            module: nn.Module = kind._from_config(parsed, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TersorError(
            f"{checkpoint.directory}: {architectures[0]} cannot be built from config.json: {error}"
        ) from None
    _fill_computed_buffers(module)
    return module.eval()


def compute_dtype(checkpoint: Checkpoint, device: torch.device | str, dtype: str = "auto") -> torch.dtype:
    """The dtype to run in. "auto": float32 on a CPU, where half precision is slower and coarser; else the checkpoint's own."""
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


class _KeyMap:
    """Published tensor names to the module tree's own, as transformers' conversion mapping says; the identity for others."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = dict(_state(module, ""))
        self.transforms: list[Any] = []
        self.prefix = getattr(module, "base_model_prefix", None)
        if self.prefix is not None:
            from transformers.conversion_mapping import get_model_conversion_mapping

            self.transforms = get_model_conversion_mapping(module)  # type: ignore[arg-type]
        self.converters: list[Any] = [t for t in self.transforms if hasattr(t, "operations")]
        self.renamings: list[Any] = [t for t in self.transforms if not hasattr(t, "operations")]

    def runtime_name(self, key: str) -> str:
        if self.prefix is None:
            return key
        from transformers.core_model_loading import rename_source_key

        name: str
        name, _ = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and key in self.state:
            name, _ = rename_source_key(key, [], [], self.prefix, self.state)
        return name

    def sources(self, names: Iterable[str]) -> list[str]:
        """The names under which keys are filed for these parameters: a converter files all its targets under the first."""
        found = []
        for name in names:
            found.append(name)
            found.extend(first for first, targets in self._targets.items() if name in targets)
        return found

    def converted(self, keys_of: dict[str, list[str]]) -> set[str]:
        """Parameters that a conversion makes beside the one its keys are filed under."""
        from itertools import chain

        self._targets: dict[str, set[str]] = {}
        for converter in self.converters:
            targets = list(converter.target_patterns)
            for name in keys_of:
                if targets[0] in name and name in self.state:
                    self._targets.setdefault(name, set()).update(
                        other
                        for other in (name.replace(targets[0], each) for each in targets[1:])
                        if other in self.state
                    )
        return set(chain.from_iterable(self._targets.values()))

    def load(self, slices: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        if self.prefix is None:
            for key, piece in slices.items():
                expected = self.state[key]
                tensor = piece[...]
                if tensor.shape != expected.shape:
                    raise TersorError(f"{key} is {tuple(tensor.shape)}; the model's is {tuple(expected.shape)}")
                own = tensor.to(device, expected.dtype if expected.is_floating_point() else None, copy=True)
                _set(self.module, key, own)
            return
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            config = LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=self.transforms)
            info, _ = convert_and_load_state_dict_in_model(self.module, slices, config, None)  # type: ignore[arg-type]
        finally:
            if shown:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if info.mismatched_keys:
            name, got, expected = sorted(info.mismatched_keys)[0]
            raise TersorError(f"{name} is {tuple(got)}; the model's is {tuple(expected)}")
        if info.conversion_errors:
            name, reason = sorted(info.conversion_errors.items())[0]
            raise TersorError(f"{name} cannot be made from the checkpoint's tensors: {reason}")


def _state(module: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers by their full names; tied ones under each of their names."""
    start = f"{prefix}." if prefix else ""
    return [
        (start + name, tensor)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    ]


def _get(module: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    if leaf in holder._buffers:
        holder._buffers[leaf] = tensor
    else:
        holder._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tied_parameters(module: nn.Module) -> dict[str, str]:
    """{tied name: the name that the checkpoint holds}."""
    declared = getattr(module, "all_tied_weights_keys", None)
    if isinstance(declared, dict):
        return dict(declared)
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def _fill_computed_buffers(module: Any) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, ...) are computed by the model's own initialization, which does
    nothing to parameters on the meta device."""
    for each in module.modules():
        for name in each._non_persistent_buffers_set:
            if each._buffers.get(name) is not None:
                each._buffers[name] = torch.zeros_like(each._buffers[name], device="cpu")
        each._is_hf_initialized = False
    module.initialize_weights()


def _initialize_buffer(module: nn.Module, name: str) -> bool:
    """A persistent buffer that older checkpoints do not have: compute it. False where the model does not know how."""
    owner = module.get_submodule(name.rpartition(".")[0])
    root: Any = module
    if not hasattr(root, "_init_weights"):
        return False
    leaf = name.rpartition(".")[2]
    buffer = owner._buffers.get(leaf)
    if buffer is None:
        return False
    owner._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
    root._init_weights(owner)
    return True


def _matrix_shape(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape[0], weight[0].numel()
    return (columns, rows) if is_conv1d(layer) else (rows, columns)


def _is_under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}.")
