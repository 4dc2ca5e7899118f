"""A function in a process of its own: its peak of memory is its own, and where it dies the caller lives.

Importing torch and transformers takes seconds. So on Linux such a process is forked from one that has imported both and computed
nothing. With a GPU it is a new process: CUDA does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import TypeVar, cast

import torch

from tersor.errors import TersorError
from tersor.untrusted import first_words

T = TypeVar("T")
IMPORTED = ["torch", "transformers.modeling_utils"]


class NoTimeError(TersorError):
    """The time given is over."""


class EndedError(TersorError):
    """The process ended without an answer."""


def own_processes() -> ForkServerContext | SpawnContext:
    """The `multiprocessing` whose processes share nothing with this one."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def apart(work: Callable[..., T], *arguments: object, deadline: float | None = None) -> T:
    """What `work(*arguments)` returns; both are pickled. deadline: on the clock of time.monotonic.

    Raises TersorError with the reason where `work` fails, NoTimeError where the deadline passes, EndedError where the process
    dies.
    """
    context = own_processes()
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, arguments, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        if not answers.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
            process.terminate()
            raise NoTimeError("the time given is over")
        answer, error = answers.recv()
    except EOFError:
        process.join()
        raise EndedError(f"the process ended with status {process.exitcode}, maybe for lack of memory") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if error:
        raise TersorError(error)
    return cast(T, answer)


def _answer(answers: Connection, work: Callable[..., object], arguments: tuple[object, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        said: tuple[object, str] = (work(*arguments), "")
    except KeyboardInterrupt:  # the parent says so
        os._exit(130)
    except TersorError as error:
        said = (None, " ".join(str(error).split()))
    except Exception as error:
        said = (None, f"{type(error).__name__}: {first_words(error)}")
    answers.send(said)
