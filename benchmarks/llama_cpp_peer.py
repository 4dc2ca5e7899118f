"""llama.cpp for cpu_decode.py, in a process of its own: run by a Python that has llama-cpp-python and gguf.

Writes a GGUF file of random weights in the mixture of llama.cpp's own Q4_0 files (all Q4_0, the head Q6_K), loads it, and for
every line "PROMPT_TOKENS NEW_TOKENS" on standard input prints one JSON line with the seconds of both parts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

BLOCK = {
    "Q4_0": (32, 18, 0),
    "Q6_K": (256, 210, 208),
}  # weights of a block, its bytes, and where in them the float16 scale is


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """[rows, bytes of a row]: random codes, and scales that keep the activations finite."""
    weights, size, place = BLOCK[kind]
    blocks = rng.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
    scale = np.array([0.002 if kind == "Q4_0" else 1e-5], dtype=np.float16).view(np.uint8)
    blocks[:, :, place : place + 2] = scale
    return blocks.reshape(rows, -1)


def write(path: Path, shape: dict[str, int]) -> None:
    hidden, ffn, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = hidden // heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("llama")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *byte_tokens, *(f"t{i}" for i in range(vocabulary - 259))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocabulary - 259)])
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, kind: str = "Q4_0") -> None:
        writer.add_tensor(
            name, random_blocks(rng, kind, rows, columns), raw_dtype=getattr(gguf.GGMLQuantizationType, kind)
        )

    matrix("token_embd.weight", vocabulary, hidden)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"blk.{layer}."
        matrix(prefix + "attn_q.weight", hidden, hidden)
        matrix(prefix + "attn_k.weight", kv_heads * width, hidden)
        matrix(prefix + "attn_v.weight", kv_heads * width, hidden)
        matrix(prefix + "attn_output.weight", hidden, hidden)
        matrix(prefix + "ffn_gate.weight", ffn, hidden)
        matrix(prefix + "ffn_up.weight", ffn, hidden)
        matrix(prefix + "ffn_down.weight", hidden, ffn)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}{norm}.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    matrix("output.weight", vocabulary, hidden, "Q6_K")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder, shape, context, threads = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    path = folder / "model-q4_0.gguf"
    write(path, shape)
    model = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    features = llama_cpp.llama_print_system_info().decode().strip().replace(" = 1", "").replace(" |", ",").strip(", ")
    print(
        json.dumps({"version": llama_cpp.__version__, "features": features, "bytes": path.stat().st_size}), flush=True
    )
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        prompt_tokens, new_tokens = map(int, line.split())
        prompt = rng.integers(259, shape["vocab_size"], prompt_tokens).tolist()
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            model.eval(prompt[:1])
        print(json.dumps({"prefill": first - start, "decode": time.perf_counter() - first}), flush=True)


if __name__ == "__main__":
    main()
