"""The report's data and its page, without a browser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import Ran
from zoo import tiny_models

import tersor
from tersor import RTN, TersorError, models
from tersor.checkpoint.room import RUN_FILE
from tersor.compress.run_record import command_of
from tersor.evaluate.loaders import REFUSED, TESTED, UNTESTED, loaders_of
from tersor.evaluate.sizes import sizes_of
from tersor.evaluate.weight_view import BINS, histogram, layer_views, place_of
from tersor.report import measure, read
from tersor.report.collect import collect
from tersor.report.data import Report, Speed, embedded, shortened
from tersor.report.figures import frontier, heat_map, size_figure
from tersor.report.html import differences
from tersor.report.page import page_of, write_page
from tersor.train.checkpoint import save_model

pytest.importorskip("plotly", reason="plotly, the extra `report`, is not installed")
HOSTILE = "</script><script>alert(1)</script>&<b>\u2028"


@pytest.fixture(scope="module")
def results(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("results")
    for bits in (4, 3):
        tersor.compress(
            small_source, tersor.GPTQ(bits=bits, group_size=32), out=folder / f"b{bits}", samples=2, seq_len=32
        )
    return [folder / "b4", folder / "b3"]


@pytest.fixture(scope="module")
def report(results: list[Path], small_source: Path) -> Report:
    return collect(
        results, against=small_source, prompts=[HOSTILE], seq_len=32, max_windows=3, max_new_tokens=6, measure=False
    )


def test_a_job_keeps_how_it_went_and_its_command_makes_the_same_bytes(
    results: list[Path], small_source: Path, tmp_path: Path, tersor_command: Callable[..., Ran]
) -> None:
    run = json.loads((results[0] / RUN_FILE).read_text())
    assert [each["name"] for each in run["blocks"]] == ["", "model.layers.0", "model.layers.1"]
    assert all(each["seconds"] >= 0 and each["memory"] > 2**20 for each in run["blocks"])
    assert run["peak_memory"] > 2**20
    words = run["command"].split()
    assert words[:3] == ["tersor", "quantize", str(small_source)]
    again = [*words[1:-1], tmp_path / "again"]
    assert tersor_command(*again).status == 0
    one, other = (folder / "model.safetensors" for folder in (results[0], tmp_path / "again"))
    assert one.read_bytes() == other.read_bytes()
    layers = json.loads((results[0] / "tersor.json").read_text())["layers"]
    assert all(layer["condition"] >= 1 for layer in layers)


def test_a_command_says_what_differs_from_the_defaults() -> None:
    from tersor.compress.recipe import Recipe, make_rules
    from tersor.compress.settings import Settings

    method = tersor.GPTQ(bits=3, sym=False, true_sequential=False, mse=True)
    asked = Settings(head=True, include=("*.a b", "c"), calibration=Path("my text.txt"), out=Path("/x/out"))
    assert command_of("org/name", [Recipe(method)], asked) == (
        "tersor quantize org/name --method gptq --bits 3 --asym --no-true-sequential --mse --calibration 'my text.txt' "
        "--include '*.a b' --include c --head --out out"
    )
    by_file = [Recipe(method, make_rules([{"match": "*", "skip": True}]))]
    assert command_of("m", by_file, Settings()) == "tersor compress recipe recipe.yaml m --out OUT"
    assert command_of(torch.nn.Linear(2, 2), [Recipe(RTN())], Settings()) is None
    assert command_of("m", [Recipe(RTN())], Settings(calibration=["a"])) is None


def test_sizes_account_for_every_byte(results: list[Path], small_source: Path) -> None:
    from tersor.checkpoint.source import open_checkpoint

    for model in (*results, small_source, "demo-vit"):
        sizes = sizes_of(model)
        assert sum(part.bytes for part in sizes.everything) == sum(open_checkpoint(model).bytes_of_tensors().values())
    packed = sizes_of(results[0])
    linear = next(part for part in packed.everything if part.kind == "linear layers, packed")
    assert sum(part.bytes for part in packed.packed) == linear.bytes
    assert packed.packed_bits == pytest.approx(tersor_bits(results[0]))
    assert sizes_of(small_source).packed_bits is None


def tersor_bits(model: Path) -> float:
    return float(json.loads((model / RUN_FILE).read_text())["bits_per_weight"])


def test_views_are_those_of_the_weights(results: list[Path], small_source: Path) -> None:
    mine, original = tersor.load(results[0]), tersor.load(small_source)
    name = "model.layers.1.mlp.up_proj"
    view = next(each for each in layer_views(results[0], small_source) if each.name == name)
    W = original.get_submodule(name).weight.detach()
    Q = mine.get_submodule(name).packed.dequantize(torch.float32)
    assert view.relative_error == pytest.approx(float((W - Q).norm() / W.norm()), rel=1e-5)
    assert view.original is not None
    assert sum(view.original.counts) == W.numel()
    assert len(view.original.counts) == BINS
    assert all(each.relative_error == 0 for each in layer_views(small_source, small_source))
    assert histogram(torch.zeros(4), 0.0).counts[BINS // 2] == 4


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", ((3,), "self_attn.q_proj")),
        ("layers.0.blocks.1.attn.qkv", ((0, 1), "attn.qkv")),
        ("model.layers.2.mlp.experts.7.up_proj", ((2,), "mlp.experts.*.up_proj")),
        ("model.layers.2.mlp.experts.down_proj.5", ((2,), "mlp.experts.down_proj.*")),
        ("lm_head", ((), "lm_head")),
    ],
)
def test_the_place_of_a_layer(name: str, place: object) -> None:
    assert place_of(name) == place


def test_the_page_and_its_json_read_back(report: Report, tmp_path: Path) -> None:
    write_page(report, tmp_path / "report.html")
    (tmp_path / "report.json").write_text(json.dumps(report.as_dict()))
    found = read(tmp_path / "report.html")
    assert found == read(tmp_path / "report.json") == json.loads(json.dumps(report.as_dict()))
    assert found["results"][0]["continuations"][0]["prompt"] == HOSTILE
    assert found["results"][0]["compared"][0]["found"]["kl"]["mean"] > 0
    write_page(report, tmp_path / "report.html")  # a report may be replaced


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.levels: list[int] = []
        self.labels: list[str] = []
        self.ids: list[str] = []
        self.tables = self.captions = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if found.get("role") == "img":
            self.labels.append(found.get("aria-label") or "")
        if "id" in found:
            self.ids.append(found["id"] or "")
        self.tables += tag == "table"
        self.captions += tag == "caption"


def test_names_and_texts_are_escaped_and_the_page_is_in_order(report: Report) -> None:
    page = page_of(report)
    assert "<script>alert" not in page
    elements = Elements()
    elements.feed(page)
    assert elements.tags.count("script") == 4
    assert "b" not in elements.tags
    assert elements.levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(elements.levels, elements.levels[1:], strict=False))
    assert elements.tables == elements.captions > 0
    assert elements.labels
    assert all(elements.labels)
    assert len(set(elements.ids)) == len(elements.ids)
    assert "default-src 'none'" in page
    assert json.loads(embedded({"a": HOSTILE, "b": math.inf})) == {"a": HOSTILE, "b": None}
    assert "<" not in embedded(HOSTILE)


def test_the_five_worst_layers_are_named(report: Report) -> None:
    page = page_of(report)
    errors = {each.name: each.error or 0.0 for each in report.results[0].layers}
    worst = sorted(errors, key=lambda name: -errors[name])[:5]
    table = page[page.index("The 5 worst layers</caption>") :]
    assert re.findall(r'<th scope="row">([^<]*)</th>', table)[:5] == worst


def test_an_attribution_decides_which_layers_are_worst(results: list[Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj"
    row = {
        "name": name,
        "kind": "self_attn.k_proj",
        "depth": 0,
        "bits": 4.2,
        "kl": 0.5,
        "half_width": 0.1,
        "restored": 0.3,
    }
    file = tmp_path / "attribution.json"
    file.write_text(json.dumps({"rows": [row], "total_kl": 0.9, "model": "elsewhere"}))
    found = collect(results[:1], attributions=[file])
    layer = next(each for each in found.results[0].layers if each.name == name)
    assert (layer.kl, layer.restored) == (0.5, 0.3)
    table = page_of(found).partition("worst layers</caption>")[2]
    assert re.findall(r'<th scope="row">([^<]*)</th>', table)[0] == name
    with pytest.raises(TersorError, match="none of"):
        collect(results, attributions=[file])
    file.write_text(json.dumps({"rows": [{**row, "name": "other"}], "model": str(results[0])}))
    with pytest.raises(TersorError, match="names no layer"):
        collect(results[:1], attributions=[file])


def written(tmp_path: Path, rows: list[dict[str, object]], blocks: list[dict[str, object]], **more: object) -> Path:
    """A file as of `tersor attribute`."""
    usual = {"kind": "block", "depth": 0, "bits": 4.0, "half_width": 0.1, "restored_half_width": 0.1}
    file = tmp_path / "attribution.json"
    each = {"rows": [usual | row for row in rows], "blocks": [usual | row for row in blocks], "model": "elsewhere"}
    file.write_text(json.dumps({**each, "total_kl": 0.9, "by": "layer", "measure": "KL", **more}))
    return file


def test_what_was_measured_together_is_counted_once(results: list[Path], tmp_path: Path) -> None:
    first, second = "model.layers.0", "model.layers.1"
    q, k, v, up = (
        f"{first}.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    )
    rows = [
        {"name": up, "kl": 0.1, "restored": 0.1, "members": [up]},
        {"name": f"{q} + k_proj", "kind": "self_attn.q_proj + k_proj", "kl": 0.2, "restored": 0.2, "members": [q, k]},
    ]
    blocks = [
        {"name": first, "kl": 0.5, "restored": 0.5, "members": [q, k, v, up]},
        {
            "name": second,
            "kl": 0.3,
            "restored": 0.3,
            "members": [f"{second}.self_attn.q_proj", f"{second}.mlp.up_proj"],
        },
    ]
    left = [v, f"{second}.self_attn.q_proj", f"{second}.mlp.up_proj"]
    found = collect(results[:1], attributions=[written(tmp_path, rows, blocks, left=left)])
    costs = {each.name: each.kl for each in found.results[0].layers if each.kl is not None}
    assert costs == {up: 0.1, f"{q} + k_proj": 0.2, second: 0.3}
    page = page_of(found)
    table = page.partition("worst layers</caption>")[2]
    assert [float(each) for each in re.findall(r">([0-9.]+)%<", table)[:3]] == [50.0, 33.3, 16.7]
    assert "3 were not measured in the time given" in page
    by_block = written(tmp_path, blocks, [], by="block")
    layers = collect(results[:1], attributions=[by_block]).results[0].layers
    assert {each.name: each.kl for each in layers if each.kl is not None} == {first: 0.5, second: 0.3}
    assert len({each.depth for each in layers if each.kl is not None}) == 2


def test_costs_are_named_by_what_was_measured(results: list[Path], tmp_path: Path) -> None:
    row = {"name": "model.layers.0.mlp.up_proj", "kl": 0.1, "restored": 0.1}
    page = page_of(collect(results[:1], attributions=[written(tmp_path, [row], [], measure="MSE")]))
    where = page.partition("Which layers cost what</h3>")[2].partition("</table>")[0]
    assert "MSE that it costs" in where
    assert "KL" not in where
    assert "nats" not in where


def test_names_are_as_long_as_they_must_be() -> None:
    assert shortened(["out/model", "base/model/", "/x/other"]) == {
        "out/model": "out/model",
        "base/model/": "base/model",
        "/x/other": "other",
    }
    assert set(shortened(["/x/m", "x/m", "m"]).values()) == {"/x/m", "x/m", "m"}


def test_models_of_one_name_have_bars_of_their_own(report: Report) -> None:
    result = report.results[0]
    both = [dataclasses.replace(result, name=name) for name in ("out/model", "base/model")]
    figure = size_figure(dataclasses.replace(report, results=both), both)
    assert figure["data"][0]["y"] == ["out/model", "base/model"]


def test_a_packed_head_leaves_the_embedding_looked_up(small_source: Path, tmp_path: Path) -> None:
    tersor.compress(small_source, RTN(bits=4, group_size=32), out=tmp_path / "head", head=True)
    sizes = sizes_of(tmp_path / "head")
    assert any(part.kind == "output head, packed" for part in sizes.everything)
    assert sizes.looked_up == sizes_of(small_source).looked_up > 0
    assert not sizes.experts


def test_llama_cpp_is_what_the_export_takes(small_source: Path, tmp_path: Path) -> None:
    def state(model: Path, **changes: object) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        quantization = changes.pop("quantization", {})
        config |= changes
        if "quantization_config" in config:
            config["quantization_config"] |= quantization
        (folder / "config.json").write_text(json.dumps(config))
        return next(each.state for each in loaders_of(folder) if "llama.cpp" in each.engine)

    tersor.compress(small_source, RTN(bits=4, group_size=32), out=tmp_path / "gptq", format="gptq")
    gptq = tmp_path / "gptq"
    assert state(small_source) == state(gptq) == TESTED
    assert state(small_source, hidden_act="gelu") == REFUSED
    assert state(small_source, architectures=["LlamaForSequenceClassification"]) == REFUSED
    assert state(gptq, quantization={"group_size": 48}) == REFUSED
    assert state(gptq, quantization={"bits": 8, "sym": False}) == REFUSED
    assert state(gptq, quantization={"group_size": 64}) == UNTESTED
    assert state(small_source, dtype="float16") == UNTESTED
    method = RTN(bits=4, group_size=32)
    tersor.compress(small_source, method, out=tmp_path / "float32", format="compressed-tensors")
    assert state(tmp_path / "float32") == UNTESTED  # as its steps are


def test_a_language_model_of_ours_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("TURNS", 1), ("PREFIX", 4), ("NEW", 2)):
        monkeypatch.setattr(measure, name, few)
    folder = tmp_path / "mamba"
    folder.mkdir()
    save_model(models.create("mamba", **models.find("mamba").small), folder, {}, ())
    speed = measure._speed_of(str(folder), sizes_of(folder), "auto", "cpu")
    assert speed.decode[0] > 0


def test_a_mixture_of_experts_is_known(tmp_path: Path) -> None:
    tiny_models.build("mixtral").save_pretrained(tmp_path)
    assert sizes_of(tmp_path).experts


def test_a_heat_map_sums_the_experts_of_a_block() -> None:
    from tersor.report.data import Layer

    layers = [Layer(f"l.{d}.experts.{e}.up", d, "experts.*.up", error=1.0 + d) for d in (0, 1) for e in range(3)]
    trace = heat_map(layers, "error", "error")["data"][0]
    assert trace["customdata"] == [[3.0, 6.0]]


def test_the_frontier_holds_what_nothing_beats() -> None:
    assert frontier([(1, 5), (2, 3), (3, 4), (4, 1), (2, 3)]) == [0, 1, 3, 4]


def test_differences_join_to_the_texts() -> None:
    first, second = differences("the <cat> sat", "the dog sat down")
    strip = {"del": re.compile(r"</?del>"), "ins": re.compile(r"</?ins>")}
    assert strip["del"].sub("", first) == "the &lt;cat&gt; sat"
    assert strip["ins"].sub("", second) == "the dog sat down"
    assert "<ins>dog</ins>" in second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "no model at /nowhere"),
        (["{empty}"], "has no config.json"),
        (["{b4}", "{b4}"], "given twice"),
        (["{b4}", "--text", "builtin"], "--against"),
        (["{b4}", "--against", "demo-vit"], "has no model.layers.0"),
        (["{b4}", "--out", "{mine}"], "would be lost"),
        (["{b4}", "--attribution", "{mine}"], "mine.txt"),
        (["{b4}", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["{b4}", "--max-new-tokens", "4"], "--max-new-tokens does nothing"),
        (["{b4}", "--measure", "--seq-len", "64"], "--seq-len does nothing"),
        (["{b4}", "--max-windows", "2"], "--max-windows does nothing"),
        (["{b4}", "--dtype", "float32"], "--dtype does nothing"),
    ],
)
def test_bad_input_is_one_line(
    tersor_command: Callable[..., Ran], results: list[Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.txt").write_text("dear")
    places = {"b4": results[0], "empty": tmp_path / "empty", "mine": tmp_path / "mine.txt"}
    given = [each.format(**places) for each in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "report.html")]
    ran = tersor_command("report", *given)
    assert ran.status == 2
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "mine.txt").read_text() == "dear"


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    for content in ("hello", "{}", '{"kind": "other"}', "[" * 5000):
        (tmp_path / "file").write_text(content)
        with pytest.raises(TersorError, match="is no report"):
            read(tmp_path / "file")


def test_a_measured_speed_is_shown_with_its_share_of_the_bandwidth(report: Report) -> None:
    assert "Not measured" in page_of(report)
    speed = Speed("LlamaCPU", (50.0, 40.0, 60.0), (500.0, 400.0, 600.0), 128, 32, 10**9, 10**8, 1e10, 0.5, "2 threads")
    measured = dataclasses.replace(report, results=[dataclasses.replace(report.results[0], speed=speed)])
    page = page_of(measured)
    assert "50.0 (40.0 - 60.0)" in page
    assert ">50%<" in page
    assert "10.0 GB/s" in page
    routed = dataclasses.replace(speed, share=None, weight_bytes=None)
    page = page_of(dataclasses.replace(report, results=[dataclasses.replace(report.results[0], speed=routed)]))
    assert "A mixture of experts reads some" in page
    assert ">50%<" not in page


def test_json_is_what_the_page_says(tersor_command: Callable[..., Ran], results: list[Path], tmp_path: Path) -> None:
    ran = tersor_command("report", results[0], "--out", tmp_path / "page.html", "--json")
    (tmp_path / "said.json").write_text(ran.out)
    assert read(tmp_path / "page.html") == read(tmp_path / "said.json")
