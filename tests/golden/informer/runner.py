from golden.harness import Case, run_model
from torch import Tensor

WITHOUT_EFFECT = ("output_attention", "device")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    inputs = case.inputs()
    tables = [name for name in inputs if name.startswith("index_sample.")]
    given = {int(name.rpartition(".")[2]): inputs.pop(name) for name in tables}
    if given:
        inputs["index_sample"] = [given[n] for n in sorted(given)]
    where = {"enc_embedding": "enc_embedding", "dec_embedding": "dec_embedding"}
    where |= {"encoder": "encoder", "decoder": "decoder"}
    return run_model(case, "informer", config=config, inputs=inputs, outputs=where)
