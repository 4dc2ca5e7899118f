from typing import Any

import torch
from golden.harness import Case, check_parameters
from torch import Tensor, nn

import tersor.models
from tersor.data.speech_features import filterbank, low_frame_rate
from tersor.layers.integrate_and_fire import fire_in_steps, integrate_and_fire
from tersor.models.speech.paraformer_parts import padding_mask

TOP = (
    "input_size",
    "vocab_size",
    "ctc_weight",
    "lsm_weight",
    "length_normalized_loss",
    "predictor_weight",
    "predictor_bias",
    "sampling_ratio",
)
DEFAULTS = {  # of the published constructor, where they are not ours
    "ctc_weight": 0.5,
    "lsm_weight": 0.0,
    "length_normalized_loss": False,
    "predictor_weight": 0.0,
    "predictor_bias": 0,
    "sampling_ratio": 0.2,
}
OF_ENCODER = ("output_size", "attention_heads", "linear_units", "num_blocks", "macaron_style", "use_cnn_module")
OF_DECODER = {
    "attention_heads": "decoder_heads",
    "linear_units": "decoder_units",
    "num_blocks": "decoder_blocks",
    "att_layer_num": "att_layer_num",
    "kernel_size": "decoder_kernel",
    "sanm_shfit": "decoder_shift",
}
OF_PREDICTOR = ("threshold", "l_order", "r_order", "tail_threshold", "smooth_factor", "noise_threshold")
KINDS = {
    "SANMEncoder": "sanm",
    "ConformerEncoder": "conformer",
    "ParaformerSANMDecoder": "sanm",
    "ParaformerSANDecoder": "san",
    "CifPredictor": "v1",
    "CifPredictorV2": "v2",
}


def run(case: Case) -> dict[str, Tensor]:
    if "fs" in case.config:
        return front_end(case)
    if "encoder" not in case.config:
        inputs = case.inputs()
        embeds, peaks = integrate_and_fire(**inputs)
        loop, loop_peaks, _ = fire_in_steps(**inputs, threshold=case.config["threshold"])
        results = {"embeds": embeds, "peaks": peaks, "embeds_loop": loop, "peaks_loop": loop_peaks}
        return {name: results[name] for name in case.outputs}
    model = tersor.models.load("paraformer", case.state_dict(), **ours(case.config)).eval()
    check_parameters(case, model)
    return train(case, model) if "loss" in case.outputs else recognize(case, model)


def ours(published: dict[str, Any]) -> dict[str, Any]:
    encoder, decoder = published["encoder_conf"], published["decoder_conf"]
    config = {name: published[name] for name in TOP if name in published}
    config |= {name: encoder[name] for name in OF_ENCODER if name in encoder}
    sanm = published["encoder"] == "SANMEncoder"
    config["kernel_size"] = encoder.get("kernel_size", 11) if sanm else encoder.get("cnn_module_kernel", 31)
    config |= {"shift": encoder.get("sanm_shfit") or 0, "dropout": encoder.get("dropout_rate", 0.1)}
    config |= {name: decoder[key] for key, name in OF_DECODER.items() if decoder.get(key) is not None}
    config |= {name: published["predictor_conf"][name] for name in OF_PREDICTOR if name in published["predictor_conf"]}
    config |= {part: KINDS[published[part]] for part in ("encoder", "decoder", "predictor")}
    return {"att_layer_num": decoder["num_blocks"], **DEFAULTS, **config}


def front_end(case: Case) -> dict[str, Tensor]:
    config, waveform = case.config, case.inputs()["waveform"][0]
    fbank = filterbank(
        waveform,
        sampling_rate=config["fs"],
        bins=config["n_mels"],
        frame_ms=config["frame_length"],
        shift_ms=config["frame_shift"],
        window=config["window"],
        dither=config["dither"],
    )
    features = low_frame_rate(fbank, m=config["lfr_m"], n=config["lfr_n"])
    return {"fbank": fbank[None], "features": features[None]}


@torch.no_grad()
def recognize(case: Case, model: nn.Module) -> dict[str, Tensor]:
    inputs = case.inputs()
    h, mask = model.encode(**inputs)
    predicted = model.predictor(h, mask)
    log_probs, counts = model(**inputs)
    results = {
        "encoder_out": h * mask[..., None],
        "encoder_lens": mask.sum(1),
        "alphas": predicted.alphas,
        "token_num": predicted.token_num,
        "acoustic_embeds": predicted.embeds,
        "peaks": predicted.peaks,
        "log_probs": log_probs * padding_mask(counts, log_probs.shape[1])[..., None],
    }
    if "ctc_log_probs" in case.outputs:
        results["ctc_log_probs"] = model.ctc(h) * mask[..., None]
    return {name: results[name] for name in case.outputs}


def train(case: Case, model: nn.Module) -> dict[str, Tensor]:
    inputs = case.inputs()
    losses = model.losses(**inputs, order=lambda length: torch.arange(length - 1, -1, -1))
    losses.loss.backward()
    real = padding_mask(inputs["text_lengths"] + model.config.predictor_bias, losses.logits.shape[1])
    encoder = "encoder.encoders0.0.self_attn.linear_q_k_v.weight"
    watched = {"cif_output": "predictor.cif_output.weight", "embed": "decoder.embed.0.weight", "encoder_first": encoder}
    results = {
        "loss": losses.loss[None],
        "loss_att": losses.attention[None],
        "loss_pre": losses.length[None],
        "loss_ctc": losses.ctc[None],
        "semantic_embeds": losses.embeds,
        "logits": losses.logits * real[..., None],
    }
    for name, key in watched.items():
        if f"grad_norm_{name}" in case.outputs:
            results[f"grad_norm_{name}"] = model.get_parameter(key).grad.norm()[None]
    return {name: results[name] for name in case.outputs}
