"""What a user may call a model, and where that lies on this machine. It needs no PyTorch, so that a command can say at once that
there is no such model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tersor import models
from tersor.errors import TersorError
from tersor.untrusted import readable

BUILTIN = ("demo", "demo-vit")  # models that come with the package, under tersor/assets
JOB_FOLDER = ".tersor-job"  # what an unfinished compression leaves in its output directory


def local_path(model: str) -> Path | None:
    """The directory or GGUF file that a name means; None for a name of the hub's form, which may be there or not.

    Raises TersorError for any other name."""
    if model in BUILTIN:
        return Path(str(files("tersor") / "assets" / model))
    with readable(model):
        path = Path(model).expanduser()
        if path.is_dir() or is_gguf(path):
            return path
        exists = path.exists()
    if exists:
        raise TersorError(
            f"{path} is a file; give the directory that holds the model's config.json, a .gguf file, "
            "or say with --as which model of `tersor models` a published file is"
        )
    if not _is_hub_name(model):
        raise TersorError(_no_model(model))
    return None


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))


def _no_model(name: str) -> str:
    if models.known(name):  # often given in place of weights
        return (
            f"{name} is an architecture, which knows nothing yet: give the folder that `tersor train {name}` made; "
            f"published weights are `tersor predict {name} --checkpoint FILE`, and FILE with --as {name} elsewhere"
        )
    return f"no model at {name}: give a directory, a hub name such as org/name, or one of {', '.join(BUILTIN)}"
