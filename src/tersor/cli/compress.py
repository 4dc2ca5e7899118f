"""`tersor compress METHOD MODEL`: every method, each a command with its own options; and recipes of several steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tersor.cli.job_options import run_job, split, with_options
from tersor.cli.options import Layers, SummaryAsJson, Variant, Verb, opened_as
from tersor.compress.recipe import Recipe, read_steps
from tersor.methods.method import Method, PackedMethod, from_options, methods

Model = Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, `demo` or `demo-vit`.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; must not exist, or hold this job unfinished.")]
METHODS = methods()


class MethodFirst(TyperGroup):
    """A group that also takes `MODEL --method METHOD`, as it was written before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = [part for each in args for part in (each.split("=", 1) if each.startswith("--method=") else [each])]
        if args and args[0] not in self.commands and "--method" in args[:-1]:
            at = args.index("--method")
            args = [args[at + 1], *args[:at], *args[at + 2 :]]
        if len(args) > 1 and args[0] not in self.commands and args[1] in self.commands:
            ctx.fail(f"the method comes first: tersor compress {args[1]} {args[0]} ...")
        return super().parse_args(ctx, args)


compress = typer.Typer(
    cls=MethodFirst,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@compress.callback()
def _compress() -> None:
    """Compress a model by any method, or by several in steps.

    Methods quantize, prune, factorize, fuse layers or drop tokens.

    `tersor compress METHOD --help` shows a method's options. The result is a model directory that `tersor eval`, `tersor.load`
    and further methods take. `tersor quantize` is the short way to weights in few bits.

    tersor compress ats demo-vit --out fewer-tokens
    """


def _command(name: str, kind: type[Method]) -> Callable[..., None]:
    def run(
        model: Model,
        out: Out,
        variant: Variant = None,
        every_layer: Layers = False,
        as_json: SummaryAsJson = False,
        **given: Any,
    ) -> None:
        settings, options = split(given, [kind])
        run_job(
            opened_as(model, variant),
            out,
            [Recipe(from_options(name, options))],
            settings,
            every_layer=every_layer,
            as_json=as_json,
        )

    original = " --original MODEL" if issubclass(kind, PackedMethod) else ""
    run.__doc__ = f"{kind.__doc__}\n\nExample: `tersor compress {name} MODEL{original} --out DIR`."
    return with_options(run, {name: kind})


def _recipe(
    file: Annotated[Path, typer.Argument(help="A YAML file: a method, or `steps`, each with a method.")],
    model: Model,
    out: Out,
    variant: Variant = None,
    every_layer: Layers = False,
    as_json: SummaryAsJson = False,
    **given: Any,
) -> None:
    """The steps of a recipe, one after another, each on the result of the last; a job that is interrupted goes on.

    Example: `tersor compress recipe steps.yaml demo --out demo-steps`.
    """
    run_job(opened_as(model, variant), out, read_steps(file), split(given)[0], every_layer=every_layer, as_json=as_json)


for _name, _kind in METHODS.items():
    compress.command(_name, cls=Verb)(_command(_name, _kind))
compress.command("recipe", cls=Verb)(with_options(_recipe, METHODS, method_options=False))
