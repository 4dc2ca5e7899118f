"""Official checkpoints into our models, with a precise account of what does not fit.

The model's own `convert_checkpoint(state)` maps published key names and shapes; everything here is the same for all:
reading the file, taking the weights out of a training checkpoint, and comparing them with the model's own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.errors import TersorError
from tersor.formats.weight_files import weight_files
from tersor.models.registry import create
from tersor.untrusted import first_words, inside, read_json, readable, regular_file

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]

# keys of training checkpoints
_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "net", "params_ema", "params")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_NAMES_SHOWN = 4


def load(
    name: str, checkpoint: str | Path | Mapping[str, Tensor], /, *, features_only: bool = False, **overrides: Any
) -> nn.Module:
    """The model `name` with a checkpoint's weights, in eval mode and float32.

    checkpoint: a .safetensors, .pth, .pt, .bin or .pdparams file, a folder with such files, or the tensors by name.
    features_only: a features.Backbone of the loaded model; `out_indices` chooses among its maps.
    overrides: fields of the model's config, for checkpoints of another size than the published variant. With `num_classes`
    (0: no head) and `in_chans` the checkpoint may have others: heads of other classes stay fresh, and the first layer's
    weights are summed over three colours to one channel, or else repeated and scaled, as timm does.
    """
    if features_only:
        from tersor.models.features import Backbone

        out_indices = overrides.pop("out_indices", None)
        return Backbone(load(name, checkpoint, **overrides), out_indices).eval()
    model = create(name, **overrides)
    fit = _fitting(name, model, overrides)
    if isinstance(checkpoint, (str, Path)):
        load_state(model, read_state(checkpoint), what=f"{name} cannot take {Path(checkpoint).name}", fit=fit)
    else:
        load_state(model, dict(checkpoint), what=f"{name} cannot take this checkpoint", fit=fit)
    return model.eval()


def _fitting(name: str, model: nn.Module, overrides: Mapping[str, Any]) -> Callable[[State], State] | None:
    """How a checkpoint of other classes or channels is brought to a model for which they were chosen; None: not at all.

    What depends on the number of classes is found by building the model a second time, without weights and with the published
    number.
    """
    chosen = {"num_classes", "in_chans"} & set(overrides)
    if not chosen:
        return None

    def fit(state: State) -> State:
        import torch

        wanted = model.state_dict()
        if "num_classes" in chosen:
            with torch.device("meta"):
                published = create(name, **{key: value for key, value in overrides.items() if key != "num_classes"})
            of_classes = {
                key
                for key, value in published.state_dict().items()
                if key not in wanted or value.shape != wanted[key].shape
            }
            others = {
                key for key in of_classes & set(state) if key not in wanted or state[key].shape != wanted[key].shape
            }
            state = {key: value for key, value in state.items() if key not in others}
            if others:
                state |= {key: wanted[key] for key in of_classes & set(wanted) if key not in state}
        if "in_chans" in chosen:
            for key, value in state.items():
                if key in wanted:
                    state[key] = _for_channels(value, wanted[key])
        return state

    return fit


def _for_channels(weight: Tensor, wanted: Tensor) -> Tensor:
    """A convolution's weights (out, 3, ...) for the channels of `wanted` (out, c, ...); others are returned as they are."""
    c = wanted.shape[1] if wanted.dim() >= 4 else 3
    if weight.dim() != wanted.dim() or c == 3 or weight.shape != (wanted.shape[0], 3, *wanted.shape[2:]):
        return weight
    if c == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-c // 3), *[1] * (weight.dim() - 2))[:, :c] * (3 / c)


def read_state(path: str | Path) -> State:
    """The tensors of a checkpoint file or folder. Pickles are read with weights_only=True: nothing in them runs."""
    path = Path(path)
    with readable(path):
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder:
        chosen = weight_files(path)
        if chosen is None:
            raise TersorError(f"{path} holds no .safetensors file")
        names = [each.name for each in chosen.files] if chosen.index is None else _shards_of(chosen.index)
        return {key: tensor for name in names for key, tensor in read_state(inside(path, name)).items()}
    if not exists:
        raise TersorError(f"there is no checkpoint {path}")
    regular_file(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _unwrap(load_file(path))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise TersorError(f"{path} cannot be read as safetensors: {first_words(error)}") from None
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _unwrap(_unpickle(path))
    if path.suffix == ".pdparams":
        return _read_paddle(path)
    raise TersorError(f"{path.name}: checkpoints end in .safetensors, .pth, .pt, .bin, .ckpt or .pdparams")


def _shards_of(index: Path) -> list[str]:
    try:
        return sorted(set(read_json(index)["weight_map"].values()))
    except (TersorError, KeyError, TypeError, AttributeError) as error:
        raise TersorError(f"{index} is not an index of shards: {error}") from None


def load_state(model: nn.Module, state: State, *, what: str, fit: Callable[[State], State] | None = None) -> None:
    """Copy `state` into `model` after its own key map; TersorError with `what` in front where anything does not fit.

    fit: changes the mapped state before it is compared.
    """
    convert = getattr(model, "convert_checkpoint", None)
    if convert is not None:
        state = convert(state)
    if fit is not None:
        state = fit(state)
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    left_over = [key for key in state if key not in wanted]
    wrong = [
        f"{key} is {list(state[key].shape)}, the model has {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    faults = [("missing", missing), ("left over", left_over), ("of the wrong shape", wrong)]
    told = [f"{len(names)} {kind} ({_some(names)})" for kind, names in faults if names]
    if told:
        raise TersorError(f"{what}: {'; '.join(told)}")
    model.load_state_dict(state, strict=False)  # not strict: only num_batches_tracked may be absent by now


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f", and {more} more" if more > 0 else "")


def _unpickle(path: Path) -> Any:
    from argparse import Namespace

    import torch

    try:
        with torch.serialization.safe_globals([Namespace]):  # training scripts store their arguments beside the weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError) as error:
        raise TersorError(
            f"{path.name} holds Python objects beside tensors and is not opened, for they could run code; "
            "if you trust it, load it yourself, torch.save the tensors alone and load that file"
        ) from error
    except Exception as error:  # bytes that are no pickle raise errors of any kind
        raise TersorError(f"{path} is no checkpoint: neither safetensors nor what torch.save writes") from error


def _read_paddle(path: Path) -> State:
    """PaddlePaddle's pickle of {name: array, or (name, array)}. Only what makes NumPy arrays is allowed in it."""
    import io

    import torch

    class ArraysOnly(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            makers = ("_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer")
            if module.split(".")[0] == "numpy" and name in makers:
                return super().find_class(module, name)
            if (module, name) in (("builtins", "tuple"), ("collections", "OrderedDict"), ("_codecs", "encode")):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        state = ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a pickle that is cut off or foreign fails in many ways
        raise TersorError(f"{path.name} is not a PaddlePaddle checkpoint of arrays: {error}") from error
    if not isinstance(state, Mapping):
        raise TersorError(f"{path.name} holds no tensors by name, but {_kind(state)}")
    arrays = {key: value[1] if isinstance(value, tuple) else value for key, value in state.items()}
    return {key: torch.tensor(value) for key, value in arrays.items() if hasattr(value, "dtype")}


def _unwrap(state: Any) -> State:
    """The weights in a training checkpoint {"model": weights, "optimizer": ...}, without wrappers' key prefixes."""
    from torch import Tensor

    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    state = _joined_parts(state)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise TersorError(f"the checkpoint holds no tensors by name, but {_kind(state)}")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise TersorError(f"{key} says it is {tuple(tensor.shape)}; the file holds fewer values")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _joined_parts(state: Any) -> Any:
    """{"encoder_state_dict": weights, "decoder_state_dict": weights, ...} as one state with "encoder." and so on in front."""
    from torch import Tensor

    if not isinstance(state, Mapping) or any(isinstance(value, Tensor) for value in state.values()):
        return state
    joined = {}
    for name, part in state.items():
        is_part = isinstance(name, str) and name.endswith("_state_dict") and isinstance(part, Mapping)
        if is_part and all(isinstance(value, Tensor) for value in part.values()):  # an optimizer's holds other things
            for key, value in part.items():
                joined[f"{name.removesuffix('_state_dict')}.{key.removeprefix('module.')}"] = value
    return joined or state


def _kind(state: Any) -> str:
    if isinstance(state, Mapping):
        keys: Iterable[Any] = list(state)[:6]
        return f"a dict with the keys {', '.join(map(repr, keys))}"
    return f"a {type(state).__name__}"
