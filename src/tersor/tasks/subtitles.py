"""A transcript as plain text, JSON, or subtitles (SubRip, WebVTT)."""

from __future__ import annotations

import json

from tersor.tasks.transcribe import Transcript

FORMATS = ("txt", "json", "srt", "vtt")


def as_text(transcript: Transcript, format: str, *, name: str | None = None) -> str:
    """The content of a file; `name` before the text where several are printed."""
    if format == "json":
        return json.dumps(transcript.as_dict(), ensure_ascii=False, indent=1) + "\n"
    if format == "txt":
        return ("" if name is None else f"{name}: ") + transcript.text + "\n"
    mark = "," if format == "srt" else "."
    blocks = ["WEBVTT\n"] if format == "vtt" else []
    for number, each in enumerate(transcript.segments, 1):
        times = f"{clock(each.start, mark)} --> {clock(each.end, mark)}"
        text = each.text.replace("&", "&amp;").replace("<", "&lt;") if format == "vtt" else each.text
        blocks.append((f"{number}\n" if format == "srt" else "") + f"{times}\n{text}\n")
    return "\n".join(blocks)


def clock(seconds: float, mark: str) -> str:
    """1:02:03 and milliseconds after the mark, as subtitles write them."""
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
