"""The picture of docs/sample.md: meshes that the small models of benchmarks/shapes.py made, beside the true ones.

python benchmarks/shape_pictures.py shapes          # the folder that shapes.py wrote; writes docs/images/small-shapes.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from common import DATA

from tersor.data.shapes import Mesh, normalised, read_mesh

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHAPES = ("spot", "homer")
COLUMNS = {
    "true": None,
    "TripoSG's VAE": "vae",
    "TripoSG's flow": "flow",
    "G3PT's tokenizer": "tokenizer",
    "G3PT": "writer",
}


def draw(axes: object, mesh: Mesh) -> None:
    x, y, z = mesh.vertices.T.numpy()
    axes.plot_trisurf(x, z, y, triangles=mesh.faces.numpy(), color="#9db4c8", shade=True, linewidth=0)  # type: ignore[attr-defined]
    axes.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), zlim=(-0.8, 0.8))  # type: ignore[attr-defined]
    axes.set_box_aspect((1, 1, 1))  # type: ignore[attr-defined]
    axes.view_init(12, -55)  # type: ignore[attr-defined]
    axes.set_axis_off()  # type: ignore[attr-defined]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    mpl.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, 4.2))
    for row, name in enumerate(SHAPES):
        for column, (title, kind) in enumerate(COLUMNS.items()):
            axes = figure.add_subplot(len(SHAPES), len(COLUMNS), row * len(COLUMNS) + column + 1, projection="3d")
            file = DATA / "shapes" / f"{name}.obj" if kind is None else Path(sys.argv[1]) / f"{kind}-{name}.glb"
            mesh = read_mesh(file)
            draw(axes, normalised(mesh) if kind is None else mesh)
            if row == 0:
                axes.set_title(title, fontsize=9)
    figure.subplots_adjust(0, 0, 1, 0.95, 0, 0)
    figure.savefig(IMAGES / "small-shapes.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
