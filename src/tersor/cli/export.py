"""`tersor export`: a model as one GGUF file, or as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.checkpoint.gguf_write import export as export_gguf
from tersor.cli.options import AsJson, Variant, opened_as, print_json, refuse
from tersor.cli.progress import progress_bar
from tersor.cli.table import wrapped
from tersor.errors import TersorError


def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, or a built-in name.")],
    out: Annotated[Path | None, typer.Option("--out", help="The GGUF file to write; its name ends in .gguf.")] = None,
    onnx: Annotated[Path | None, typer.Option("--onnx", help="The ONNX file to write; its name ends in .onnx.")] = None,
    dtype: Annotated[
        str,
        typer.Option(help="GGUF: matrices that are not quantized: auto (as stored), float32, bfloat16 or float16."),
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(help="ONNX: pixels of a side, by default those that the model was made for.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX: the version of the operators, 18 to 23; 4 bits need 21.")] = 21,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="ONNX: write packed layers that are not of 4 or 8 bits as dense ones.")
    ] = False,
    variant: Variant = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as a GGUF file (llama.cpp) or an ONNX file. GGUF takes models of the LLaMA family, ONNX any that
    torch.export takes.

    GGUF: quantized layers are written exactly. A layer that no GGUF type holds exactly is refused by name, with the reason.

    ONNX: layers of 4 and 8 bits stay integers. onnxruntime runs the file on random inputs. Where its outputs differ from torch's
    by more than 1e-3 of the largest, no file is written.

    Examples: `tersor export demo-4bit --out demo.gguf`, `tersor export demo-vit --onnx vit.onnx`.
    """
    if (out is None) == (onnx is None):
        raise TersorError("give the file to write, either --out FILE.gguf or --onnx FILE.onnx")
    if onnx is not None:
        refuse(context, "--onnx", ("dtype",))
        _export_onnx(opened_as(model, variant), onnx, image_size, opset, dequantize, overwrite, as_json)
        return
    assert out is not None
    refuse(context, "GGUF files", ("image_size", "opset", "dequantize", "variant"))
    with progress_bar(quiet=as_json) as progress:
        found = export_gguf(model, out, dtype=dtype, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({**found.__dict__, "path": str(found.path)})
        return
    types = ", ".join(f"{count} {kind}" for kind, count in found.types.items())
    typer.echo(f"{found.path}: {found.architecture}, {found.size / 1e6:.1f} MB; tensors: {types}")
    if found.bits:
        typer.echo(
            f"quantized layers: {found.bits_before:.3f} bits a weight in {model}, {found.bits:.3f} here, same values"
        )
    if found.left_out:
        typer.echo(f"left out, as the architecture has no place for them: {', '.join(found.left_out[:8])}")


def _export_onnx(
    model: str, path: Path, image_size: int | None, opset: int, dequantize: bool, overwrite: bool, as_json: bool
) -> None:
    from tersor.runtime.onnx_export import export_onnx

    with progress_bar(quiet=as_json) as progress:
        found = export_onnx(
            model,
            path,
            image_size=image_size,
            opset=opset,
            dequantize=dequantize,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json({**found.__dict__, "path": str(found.path)})
        return
    kept = "".join(f", {count} layers of {bits} bits" for bits, count in sorted(found.integers.items()))
    typer.echo(f"{found.path}: {found.size / 1e6:.1f} MB, opset {found.opset}{kept}")
    axes = ", ".join(each.removesuffix("]").replace("[", ", axis ") for each in found.dynamic)  # "image[0]"
    lines = [f"of any size: {axes}" if found.dynamic else f"all sizes are fixed: {found.fixed}"]
    same = {True: ", the same first choices", False: ", not all the same first choices", None: ""}
    lines.append(
        f"onnxruntime and torch differ by {found.difference:.1e} of the largest output at most{same[found.same_top1]}"
    )
    if found.rounded_difference is not None:
        lines.append(
            f"with onnxruntime's defaults by {found.rounded_difference:.1e}{same[found.rounded_same_top1]}: they round what "
            "packed layers multiply to 8 bits; session.qdq_matmulnbits_accuracy_level 1 does not"
        )
    lines.append(
        f"a call with a batch of {found.batch}: onnxruntime {found.onnx_ms:.2f} ms, tersor {found.torch_ms:.2f} ms"
    )
    if found.metadata:
        lines.append(f"metadata: {', '.join(found.metadata)}")
    for line in wrapped(lines, indent=2):
        typer.echo(line)
