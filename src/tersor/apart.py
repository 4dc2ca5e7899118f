"""A function in a process of its own: its peak of memory is its own, and where it dies the caller lives."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar, cast

import torch

from tersor.errors import TersorError
from tersor.untrusted import first_words

T = TypeVar("T")


class NoTimeError(TersorError):
    """The time given is over."""


class EndedError(TersorError):
    """The process ended without an answer."""


def apart(work: Callable[..., T], *arguments: object, deadline: float | None = None) -> T:
    """What `work(*arguments)` returns; both are pickled. deadline: on the clock of time.monotonic.

    Raises TersorError with the reason where `work` fails, NoTimeError where the deadline passes, EndedError where the process
    dies.
    """
    context = multiprocessing.get_context("spawn")
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
