"""What a command line asks for that is not there, told before PyTorch is imported, which takes seconds.

Only the words are looked at: which options a verb has is known after its import. So the words before the first option count as
the arguments, a file counts where it follows its option, and whatever is not understood here is left to the verb, which
checks everything itself.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from tersor import models as architectures
from tersor.checkpoint.names import JOB_FOLDER, local_path
from tersor.cli.options import refuse_without_folder
from tersor.errors import TersorError
from tersor.evaluate.yardstick_names import YARDSTICKS, check_spelling
from tersor.methods.method import method_names, unknown_method
from tersor.untrusted import readable

# Verbs that need an argument: what it is called in their help.
NEEDS = {
    **dict.fromkeys(("quantize", "advise", "eval", "attribute", "generate", "chat", "bench", "inspect"), "MODEL"),
    **dict.fromkeys(("export", "train", "predict", "transcribe", "forecast", "backtest", "sample"), "MODEL"),
    "report": "MODELS",
    "sweep": "RECIPES",
}
# Options that these verbs cannot do without.
REQUIRED = {
    **dict.fromkeys(("quantize", "compress", "sweep", "train", "sample"), ("--out",)),
    **dict.fromkeys(("forecast", "backtest"), ("--data", "--horizon")),
    "attribute": ("--against",),
}
# Options that name a file or folder to read.
READ = (
    "--attribution",
    "--calibration",
    "--chat-template",
    "--checkpoint",
    "--condition",
    "--config",
    "--data",
    "--images",
    "--prompt-file",
    "--recipe",
    "--reference",
    "--tasks-dir",
    "--text",
    "--validation",
)
MODELS = ("--against", "--original")  # options that name a model
FOLDERS = ("quantize", "compress", "sweep", "train", "demo")  # verbs whose --out is a folder that they may make
# Verbs whose --out and --plot are files in a folder that is there.
IN_FOLDER = ("advise", "attribute", "complexity", "forecast", "report", "sample")
BEST = ("best", "best-fast")  # of quantize --method, beside the methods


def check(verb: str, words: Sequence[str]) -> None:
    """Raise TersorError where the verb would do so after its imports."""
    if not {"-h", "--help"}.isdisjoint(words):
        return
    arguments = list(takewhile(lambda word: not word.startswith("-"), words))
    options = _options(words)
    if verb in NEEDS and not words:
        raise TersorError(f"{verb} needs {NEEDS[verb]}; `tersor {verb} -h` shows how")
    if verb == "compress":
        arguments = _after_method(arguments, words)
    if verb == "sweep":
        _check_files("", arguments)
    elif verb == "train" and arguments:
        _check_training(arguments[0], options)
    elif verb in NEEDS or verb == "compress":
        _check_model(verb, arguments, options)
    for option in MODELS:
        for name in options.get(option, ()):
            _check_folder(name)
    for name in options.get("--method", ()) if verb == "quantize" else ():
        if name not in (known := method_names()) and name not in BEST:
            raise unknown_method(name, known)
    for option in READ if verb != "train" else ():
        _check_files(option, [each for each in options.get(option, ()) if each != "builtin"])
    for option in REQUIRED.get(verb, ()):
        if words and option not in options:
            raise TersorError(f"{verb} needs {option}; `tersor {verb} -h` shows how")
    _check_outputs(verb, options)


def _options(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each `--option VALUE` and `--option=VALUE`. A switch gets the word after it, which nobody looks at."""
    found: dict[str, list[str]] = {}
    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            found.setdefault(name, []).append(value if equals else after)
    return found


def _after_method(arguments: list[str], words: Sequence[str]) -> list[str]:
    """The arguments of `tersor compress` behind the method, or behind `recipe` and its file."""
    known = method_names()
    if not arguments or arguments[0] not in (*known, "recipe"):
        if not arguments or "--method" in _options(words) or not {*arguments[1:]}.isdisjoint(known):
            return []  # `compress MODEL --method METHOD`, as it was written before
        meant = difflib.get_close_matches(arguments[0], known, n=1)
        hint = f"; did you mean {meant[0]}?" if meant else "; `tersor compress -h` lists them"
        raise TersorError(f"there is no method {arguments[0]}{hint}")
    if len(arguments) == 1 and len(words) == 1:
        needed = "FILE and MODEL" if arguments[0] == "recipe" else "MODEL"
        raise TersorError(f"compress {arguments[0]} needs {needed}; `tersor compress {arguments[0]} -h` shows how")
    if arguments[0] == "recipe":
        _check_files("", arguments[1:2])
        return arguments[2:]
    return arguments[1:]


def _check_model(verb: str, arguments: Sequence[str], options: Mapping[str, Sequence[str]]) -> None:
    for name in options.get("--as", ()):
        architectures.find(name)
    if not arguments:
        return
    if "--checkpoint" in options:
        architectures.find(arguments[0])
    elif "--as" in options:
        _check_files("", arguments[:1])
    else:
        forecasts = verb in ("forecast", "backtest")
        if forecasts:
            check_spelling(arguments[0])
        for name in arguments if verb == "report" else arguments[:1]:
            if name not in YARDSTICKS and not (forecasts and architectures.known(name)):  # the verb knows which fit it
                _check_folder(name, must_be_model=verb not in ("report", "sample"))
    if verb in ("predict", "transcribe"):
        _check_files("", arguments[1:], patterns=True)


def _check_folder(name: str, *, must_be_model: bool = True) -> None:
    folder = local_path(name)
    if not must_be_model or folder is None or folder.is_file() or (folder / JOB_FOLDER).exists():
        return
    if not (folder / "config.json").exists():
        raise TersorError(f"{folder} is not a model: it has no config.json")


def _check_training(what: str, options: Mapping[str, Sequence[str]]) -> None:
    """What is trained, and on which data: an environment, where the model acts, is no file."""
    if what.startswith("lra/"):
        return
    saved = Path(what) / "config.json"
    with readable(saved):
        is_saved = saved.is_file()
    acts = False
    if architectures.known(what) or not is_saved:
        acts = architectures.find(what).task == "act"
        of_arena = "--model" in options or any(each.startswith("pretrain") for each in options.get("--set", ()))
        if "--data" not in options and not of_arena:  # the verb tells what goes with lra/TASK alone
            raise TersorError(f"{what} needs --data, what it is to be trained on")
    for option in READ:
        if option != "--data" or not (acts or is_saved):
            _check_files(option, options.get(option, ()))


def _check_files(option: str, names: Sequence[str], *, patterns: bool = False) -> None:
    for name in names:
        with readable(name):
            path = Path(name).expanduser()
            if name.startswith("hf:") or path.exists() or (patterns and glob.glob(str(path), recursive=True)):
                continue
        raise TersorError(f"there is no file or folder {name}" + (f" for {option}" if option else ""))


def _check_outputs(verb: str, options: Mapping[str, Sequence[str]]) -> None:
    for out in map(Path, options.get("--out", ()) if verb in FOLDERS else ()):
        with readable(out):
            for part in (out, *out.parents):
                if part.exists() and not part.is_dir():
                    raise TersorError(f"--out {out}: {part} is a file; give a directory")
    for option in ("--out", "--plot") if verb in IN_FOLDER else ():
        for out in map(Path, options.get(option, ())):
            refuse_without_folder(option, out)
