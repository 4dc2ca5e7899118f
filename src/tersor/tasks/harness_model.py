"""`tersor` as a model type of EleutherAI's lm-evaluation-harness; importing this file registers it (lm-eval 0.4.13 or newer).

Log-likelihoods come from whole calls of the loaded model, whose quantized layers stay packed. Requests are sorted by length and
padded on the right, where a causal model does not look. Texts are continued by the engines of `runtime/generate.py`, prompts of
equal length together.

The first token (BOS): a request gets it where the tokenizer adds it by itself, and never twice; with `add_bos_token=True` each
request has it, with False none. `loglikelihood_rolling` and requests without a context begin with one `prefix_token_id`: BOS,
else the end of text.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  fills the registry, which it does itself only while that is empty
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from tersor.checkpoint.load import check_tokens, load, load_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import open_checkpoint
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.perplexity import check_causal, logits_of, why_not_causal
from tersor.progress import Progress
from tersor.runtime.engine import Engine
from tersor.runtime.generate import end_tokens, make_engine
from tersor.runtime.sampling import Sampling, choose, penalize
from tersor.untrusted import first_words

LONGEST = 2048  # tokens of a window, for models that do not say how many positions they have
NEW_TOKENS = 256  # of a task that does not say how many
MOST_ROWS = 64
_LOGITS = 1 << 29  # bytes of float32 logits in one call on a CPU
_PROBE = 16
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("tersor")
class TersorLM(TemplateLM):  # type: ignore[misc,unused-ignore]
    """pretrained: a directory, a hub name, a .gguf file or `demo`, packed or not. batch_size: rows of a call, or "auto", which
    takes what a share of the memory holds and halves it where that was too much; max_batch_size bounds it. max_length: tokens
    of a window, by default the model's positions. progress: called with (what, done, total) in place of the harness's bars.

    Raises TersorError where the model is no causal language model or has no tokenizer.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Path,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        dtype: DType = "auto",
        device: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._rows_asked = rows_asked(batch_size)
        self._most_rows = MOST_ROWS if max_batch_size is None else _positive("max_batch_size", max_batch_size)
        directory = open_checkpoint(pretrained).directory
        self.tokenizer = load_tokenizer(directory)
        if self.tokenizer is None:
            raise TersorError(f"{directory} has no tokenizer, so it cannot read the tasks' texts")
        self._add_bos, self._progress = add_bos_token, progress
        if add_bos_token and self.tokenizer.bos_token_id is None:
            raise TersorError(f"the tokenizer of {directory} has no first token; leave add_bos_token out")
        self._prefix = self._prefix_token(directory, prefix_token_id)
        self.module = load(directory, dtype=dtype, device=device).eval()
        self._device = next(self.module.parameters(), torch.empty(0)).device
        if reason := why_not_causal(self.module):
            raise TersorError(f"the harness needs a causal language model: {reason}")
        positions = positions_of(self.module)
        self._max_length = _positive("max_length", max_length or positions or LONGEST)
        if positions is not None and self._max_length > positions:
            raise TersorError(f"max_length {max_length} is more than the {positions} positions that the model has")
        probe = torch.arange(min(_PROBE, self._max_length), device=self._device)
        with torch.no_grad():
            check_causal(self.module, probe, len(probe) - 1)
            self._vocabulary = logits_of(self.module, probe[None, :1]).shape[-1]

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> TersorLM:
        """For the harness's command line, which says cuda:0 where the user names no device: here that means auto."""
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if more.get("device") == "cuda:0":
            more["device"] = "auto"
        return cls(**{**arg_dict, **more})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> TersorLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _prefix_token(self, directory: Path, given: int | None) -> int:
        known = (given, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((each for each in known if each is not None), None)
        if found is None:
            raise TersorError(
                f"the tokenizer of {directory} has neither a first nor a last token; say with prefix_token_id=N what comes "
                "before a text"
            )
        return int(found)

    # ---- what the harness asks

    @property
    def eot_token_id(self) -> Any:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    @property
    def batch_size(self) -> int | str:
        return self._rows_asked or "auto"

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise TersorError("the model's tokenizer has no chat template; leave --chat out")
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # what a template raises by itself, such as of roles that it does not know
            raise TersorError(f"the model's chat template refuses a conversation: {first_words(error)}") from error
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with the first token as the module's docstring says."""
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.bos_token):
            special = False
        given: dict[str, Any] = {} if special is None else {"add_special_tokens": special}
        ids: list[int] = self.tokenizer(string, verbose=False, **given)["input_ids"]
        first = self.tokenizer.bos_token_id
        if self._add_bos and add_special_tokens is None and ids[:1] != [first]:
            ids = [first, *ids]  # tokenizers with no rule for it add none themselves
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        found = self._scores([(context, rest) for _, context, rest in requests], disable=disable_tqdm)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats. Each token is predicted once, in windows of max_length."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            before = len(pairs)
            pairs += [make_disjoint_window(each) for each in windows]
            counts.append(len(pairs) - before)
        scores = iter(self._scores(pairs, disable=disable_tqdm))
        totals = [sum(score for score, _ in islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, the end of the text or max_gen_toks tokens."""
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        prompts, wanted = [], []
        for n, request in enumerate(requests):
            context, asked = request.args
            settings = _Generation(asked)
            room = self.max_length - settings.new
            if room < 1:
                raise TersorError(
                    f"a task asks for {settings.new} new tokens of a model with {self.max_length} positions; give fewer with "
                    "max_gen_toks in the task"
                )
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            check_tokens(self.module, torch.tensor(ids), self.tokenizer)
            prompts.append(ids)
            wanted.append(settings)
            groups[json.dumps(asked, sort_keys=True, default=str), len(ids)].append(n)
        if not prompts:
            return []
        rows = self._rows_together([len(group) for group in groups.values()])
        capacity = max(len(ids) + each.new for ids, each in zip(prompts, wanted, strict=True))
        engine = make_engine(self.module, capacity=capacity, batch=rows)
        step = self._counter("generating", len(prompts), disable=disable_tqdm)
        generator = torch.Generator(engine.device).manual_seed(0)
        found = [""] * len(prompts)
        for group in sorted(groups.values(), key=lambda group: -len(prompts[group[0]])):
            for start in range(0, len(group), rows):
                chosen = group[start : start + rows]
                settings = wanted[chosen[0]]
                texts = self._continued(engine, [prompts[n] for n in chosen], settings, generator)
                for n, text in zip(chosen, texts, strict=True):
                    found[n] = text
                    if settings.sampling.temperature == 0:
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                step(len(chosen))
        return found

    # ---- how it is done

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], *, disable: bool) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, in nats, and whether it is the likeliest at every token.

        Contexts that are too long lose their first tokens.
        """
        rows = [(context + rest)[-self.max_length - 1 :] for context, rest in pairs]
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        step = self._counter("scoring", len(rows), disable=disable)
        most, start = self._most_rows, 0
        while start < len(order):
            size = min(most, self._rows(len(rows[order[start]])))
            chosen = order[start : start + size]
            try:
                answers = self._score([rows[n] for n in chosen], [len(pairs[n][1]) for n in chosen])
            except torch.OutOfMemoryError:
                if self._rows_asked or len(chosen) == 1:
                    raise
                most = len(chosen) // 2
                torch.cuda.empty_cache()
                continue
            for n, answer in zip(chosen, answers, strict=True):
                found[n] = answer
            start += len(chosen)
            step(len(chosen))
        return found

    def _score(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """Log-likelihoods of the last counts[n] tokens of each row, given those before them. The longest row comes first."""
        ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
        check_tokens(self.module, ids, self.tokenizer)
        logits = logits_of(self.module, ids[:, :-1].to(self._device))
        answers = []
        for n, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if count >= len(row):
                raise TersorError(
                    f"a continuation of {count} tokens does not fit a window of {self.max_length} with a context; give a larger "
                    "max_length or a shorter text"
                )
            log_p = logits[n, len(row) - 1 - count : len(row) - 1].float().log_softmax(-1)  # [count, vocabulary]
            targets = torch.tensor(row[len(row) - count :], device=log_p.device)
            total = float(log_p.gather(1, targets[:, None]).double().sum())
            answers.append((total, bool((log_p.argmax(-1) == targets).all())))
        return answers

    def _continued(
        self, engine: Engine, prompts: list[list[int]], settings: _Generation, generator: torch.Generator
    ) -> list[str]:
        """Texts after prompts of equal length. An engine takes a fixed number of rows: the last prompt fills those left over."""
        engine.reset()
        ids = torch.tensor(prompts + [prompts[-1]] * (engine.batch - len(prompts)))
        seen: Tensor = ids
        end = end_tokens(self.module, self.tokenizer)
        new: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        for _ in range(settings.new):
            logits = engine.forward(ids)
            if settings.sampling.repetition_penalty != 1:
                logits = penalize(logits, seen.to(logits.device), settings.sampling.repetition_penalty)
            ids = choose(logits, settings.sampling, generator)
            seen = torch.cat([seen, ids.to(seen.device)], dim=1)
            for n in sorted(open_rows):
                token = int(ids[n])
                if token in end:
                    open_rows.discard(n)
                    continue
                new[n].append(token)
                texts[n] = self.tokenizer.decode(new[n], skip_special_tokens=True)
                cuts = [at for stop in settings.until if (at := texts[n].find(stop)) >= 0]
                if cuts:
                    texts[n] = texts[n][: min(cuts)]
                    open_rows.discard(n)
            if not open_rows:
                break
        return texts

    def _rows(self, length: int) -> int:
        """How many sequences of this length go through the model together."""
        if self._rows_asked:
            return self._rows_asked
        room = _LOGITS
        if self._device.type == "cuda":
            room = torch.cuda.mem_get_info(self._device)[0] // 8
        return max(1, room // (4 * length * self._vocabulary))

    def _rows_together(self, sizes: list[int]) -> int:
        """How many prompts are continued together, for groups of equal length of these sizes."""
        if self._rows_asked:
            return min(self._rows_asked, max(sizes))
        return max(1, min(self._most_rows, round(sum(sizes) / len(sizes))))

    def _counter(self, what: str, total: int, *, disable: bool) -> Callable[[int], None]:
        """A function to call with the number of requests that were just answered."""
        bar = tqdm(total=total, desc=what, disable=disable or self._progress is not None)
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            bar.update(count)
            if self._progress is not None:
                self._progress(what, done, total)

        return step


class _Generation:
    """What a task asks of a generated text: stop strings, new tokens, sampling. TersorError for what tersor does not do."""

    def __init__(self, asked: Any) -> None:
        said: dict[str, Any] = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
        self.until = [each for each in said.pop("until") if each]
        self.new = _positive("max_gen_toks", said.pop("max_gen_toks"))
        sampled = said.pop("do_sample")
        if said.get("num_beams") in (None, 1):
            said.pop("num_beams", None)
        given = {name: value for name in _SETTINGS if (value := said.pop(name, None)) is not None}
        if said:
            raise TersorError(f"a task asks for {', '.join(sorted(said))} in generating, which tersor does not do")
        given["temperature"] = float(asked.get("temperature", 1.0)) if sampled else 0.0
        self.sampling = Sampling(**given)


def rows_asked(batch_size: int | str) -> int | None:
    """The number of rows; None where it is to be found by itself."""
    if isinstance(batch_size, str) and batch_size.partition(":")[0] == "auto":
        return None
    return _positive("batch_size", batch_size)


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise TersorError(f"{name} {value!r} must be a whole number from 1 on" + " or auto" * (name == "batch_size"))
    return number
