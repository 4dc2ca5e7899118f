"""The regular grid on which a series lies: how far from row to row, what comes next, and which marks tell a model the time.

    step = find_step([times])              # Step(1, "h") prints as "1 h"
    step.after(times[-1:], np.arange(1, 25))        # the next 24 stamps, (1, 24)

Stamps are datetime64[s], or whole numbers where a table has none. Months, quarters and years are counted in months, so that
their stamps keep their day, or stay the last one of the month.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.errors import TersorError

UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}
MINUTE, HOUR, DAY = 60, 3600, 86400
SAFE_DAY = 28  # a day that every month has
SECONDS = "datetime64[s]"


@dataclass(frozen=True)
class Step:
    """From one row to the next."""

    count: int
    unit: str  # "s": seconds, "M": months, "row": whole numbers
    month_end: bool = False  # of months: the stamps are last days

    def __str__(self) -> str:
        if self.unit == "M":
            return f"{self.count} month" if self.count == 1 else f"{self.count} months"
        if self.unit == "row":
            return f"{self.count} row" if self.count == 1 else f"{self.count} rows"
        name, size = next((name, size) for name, size in UNITS.items() if self.count % size == 0)
        return f"{self.count // size} {name}"

    @property
    def dated(self) -> bool:
        return self.unit != "row"

    def after(self, stamps: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """stamps (B,), steps (n,), which may be negative -> (B, n)."""
        moved = steps[None] * self.count
        if self.unit == "row":
            return np.asarray(stamps[:, None] + moved)
        if self.unit == "s":
            return np.asarray(stamps[:, None] + moved.astype("timedelta64[s]"))
        months = stamps.astype("datetime64[M]")
        to = months[:, None] + moved.astype("timedelta64[M]")
        if not self.month_end:
            return np.asarray(to.astype(SECONDS) + (stamps - months.astype(SECONDS))[:, None])
        time = stamps - stamps.astype("datetime64[D]").astype(SECONDS)
        last = (to + np.timedelta64(1, "M")).astype("datetime64[D]") - np.timedelta64(1, "D")
        return np.asarray(last.astype(SECONDS) + time[:, None])

    def positions(self, first: Any, stamps: np.ndarray) -> np.ndarray:
        """float64 (n,): how many steps after `first` each stamp is; whole numbers on the grid."""
        if self.unit == "M":
            months = stamps.astype("datetime64[M]") - first.astype("datetime64[M]")
            whole = months.astype(np.int64) / self.count
            down = np.floor(whole).astype(np.int64)
            exact = self.after(np.array([first], SECONDS), down)[0]
            return np.asarray(down + (stamps - exact).astype(np.int64) / (31 * DAY * self.count))
        gone = (stamps - first).astype(np.int64)
        return np.asarray(gone / self.count)

    def season(self) -> int:
        """Rows of the nearest natural season: an hour, a day, a week or a year; 1 where none fits or there are no dates."""
        if self.unit == "M":
            return 12 // self.count if 12 % self.count == 0 else 1
        if self.unit == "row":
            return 1
        if self.count == 7 * DAY:
            return 52
        for bound, period in ((MINUTE, HOUR), (DAY, DAY), (DAY + 1, 7 * DAY)):
            if self.count < bound and period % self.count == 0:
                return period // self.count
        return 1


def find_step(series: Sequence[np.ndarray]) -> Step:
    """The commonest step of several sorted series of stamps without duplicates."""
    steps = np.concatenate([np.diff(times).astype(np.int64) for times in series]) if series else np.empty(0)
    if not len(steps):
        raise TersorError("a table of one row for each series has no step from row to row")
    if series[0].dtype.kind != "M":
        return Step(_commonest(steps), "row")
    months = _months(series) if steps.min() >= SAFE_DAY * DAY else None
    return months or Step(_commonest(steps), "s")


def _months(series: Sequence[np.ndarray]) -> Step | None:
    """The step in months, where all stamps are of one day of the month and one time of the day."""
    stamps = np.concatenate(list(series))
    days = stamps.astype("datetime64[D]")
    day = (days - stamps.astype("datetime64[M]").astype("datetime64[D]")).astype(np.int64) + 1
    next_day = days + np.timedelta64(1, "D")
    month_end = bool((next_day.astype("datetime64[M]") != stamps.astype("datetime64[M]")).all())
    time = (stamps - days.astype(SECONDS)).astype(np.int64)
    one_day = month_end or (bool((day == day[0]).all()) and day[0] <= SAFE_DAY)
    if not one_day or not bool((time == time[0]).all()):
        return None
    steps = np.concatenate([np.diff(times.astype("datetime64[M]")).astype(np.int64) for times in series])
    return Step(_commonest(steps), "M", month_end)


def _commonest(steps: np.ndarray) -> int:
    values, counts = np.unique(steps, return_counts=True)
    return int(values[counts.argmax()])


# ---- marks


MARK_KINDS = {  # kind -> its columns
    "hours": ("hour", "weekday", "day", "day of year"),
    "minutes": ("minute", "hour", "weekday", "day", "day of year"),
    "seconds": ("second", "minute", "hour", "weekday", "day", "day of year"),
    "days": ("weekday", "day", "day of year"),
    "weeks": ("day", "week"),
    "months": ("month",),
    "calendar": ("month", "day", "weekday", "hour"),
    "calendar-minutes": ("month", "day", "weekday", "hour", "quarter of an hour"),
}
LARGEST = {"second": 59, "minute": 59, "hour": 23, "weekday": 6, "day": 30, "day of year": 365, "week": 52, "month": 11}


def time_marks(times: np.ndarray, kind: str = "hours") -> np.ndarray:
    """datetime64 of any shape -> float32 (..., C). Each mark is counted from 0, divided by LARGEST, minus 0.5; those of the
    calendars are whole numbers as tables are looked up by: month and day from 1, the others from 0."""
    seconds = times.astype(SECONDS)
    days = times.astype("datetime64[D]")
    of_day = (seconds - days.astype(SECONDS)).astype(np.int64)
    day_of_year = (days - times.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64)
    weekday = (days.astype(np.int64) + 3) % 7  # 1 January 1970 was a Thursday
    counted = {
        "second": of_day % 60,
        "minute": of_day // 60 % 60,
        "hour": of_day // 3600,
        "weekday": weekday,
        "day": (days - times.astype("datetime64[M]").astype("datetime64[D]")).astype(np.int64),
        "day of year": day_of_year,
        "week": _iso_week(days, weekday) - 1,
        "month": times.astype("datetime64[M]").astype(np.int64) % 12,
        "quarter of an hour": of_day // 900 % 4,
    }
    names = MARK_KINDS[kind]
    if kind.startswith("calendar"):
        columns = [counted[name] + (name in ("month", "day")) for name in names]
    else:
        columns = [counted[name] / LARGEST[name] - 0.5 for name in names]
    return np.stack(columns, -1).astype(np.float32)


def _iso_week(days: np.ndarray, weekday: np.ndarray) -> np.ndarray:
    """1 to 53: a week belongs to the year of its Thursday."""
    thursday = days + (3 - weekday).astype("timedelta64[D]")
    first = thursday.astype("datetime64[Y]").astype("datetime64[D]")
    return np.asarray((thursday - first).astype(np.int64) // 7 + 1)
