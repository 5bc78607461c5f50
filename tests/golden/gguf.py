"""Writes a Llama checkpoint in Hugging Face's layout as one GGUF file (version 3), weights in f32.

    python3 gguf.py CHECKPOINT_DIR FILE.gguf

Needs nothing but Python: it serves tests that must not depend on llama.cpp's own converter.
"""

import array
import json
import pathlib
import struct
import sys

U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key, kind, value):
    packed = {U32: "<I", I32: "<i", F32: "<f"}
    if kind == STRING:
        body = text(value)
    elif kind == ARRAY:
        of, items = value
        body = struct.pack("<IQ", of, len(items))
        body += b"".join(text(item) if of == STRING else struct.pack(packed[of], item) for item in items)
    else:
        body = struct.pack(packed[kind], value)
    return text(key) + struct.pack("<I", kind) + body


def widened(data, dtype):
    if dtype == "F32":
        return array.array("f", data)
    assert dtype == "BF16", dtype
    halves = array.array("H", data)
    return array.array("f", array.array("I", (half << 16 for half in halves)).tobytes())


def paired(values, rows, columns, width):
    """Rows of a head from halves to pairs."""
    out = array.array("f")
    for head in range(rows // width):
        for pair in range(width // 2):
            for half in range(2):
                row = head * width + half * (width // 2) + pair
                out.extend(values[row * columns:(row + 1) * columns])
    return out


def translated(name):
    base, kind = name.rsplit(".", 1)
    if base in WHOLE:
        return f"{WHOLE[base]}.{kind}"
    _, _, number, part = base.split(".", 3)
    return f"blk.{number}.{LAYER[part]}.{kind}"


def main(source, target):
    source = pathlib.Path(source)
    config = json.loads((source / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"], config["architectures"]
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    template = source / "chat_template.jinja"
    template = template.read_text() if template.exists() else \
        json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    end = config["eos_token_id"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fields = [
        field("general.architecture", STRING, "llama"),
        field("llama.embedding_length", U32, config["hidden_size"]),
        field("llama.block_count", U32, config["num_hidden_layers"]),
        field("llama.feed_forward_length", U32, config["intermediate_size"]),
        field("llama.attention.head_count", U32, config["num_attention_heads"]),
        field("llama.attention.head_count_kv", U32, config["num_key_value_heads"]),
        field("llama.attention.key_length", U32, head_dim),
        field("llama.context_length", U32, config["max_position_embeddings"]),
        field("llama.attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"]),
        field("llama.rope.freq_base", F32, theta),
        field("tokenizer.ggml.model", STRING, "gpt2"),
        field("tokenizer.ggml.pre", STRING, "qwen2"),
        field("tokenizer.ggml.tokens", ARRAY, (STRING, [token for token, _ in vocabulary])),
        field("tokenizer.ggml.token_type", ARRAY, (I32, [3 if id in special else 1 for _, id in vocabulary])),
        field("tokenizer.ggml.merges", ARRAY, (STRING, merges)),
        field("tokenizer.ggml.eos_token_id", U32, end[0] if isinstance(end, list) else end),
        field("tokenizer.chat_template", STRING, template),
    ]
    raw = (source / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    header.pop("__metadata__", None)
    infos, bodies, offset = [], [], 0
    for name, info in header.items():
        start, stop = (8 + length + at for at in info["data_offsets"])
        values, shape = widened(raw[start:stop], info["dtype"]), info["shape"]
        if "q_proj" in name or "k_proj" in name:
            values = paired(values, shape[0], shape[1], head_dim)
        infos.append(text(translated(name)) + struct.pack("<I", len(shape))
                     + b"".join(struct.pack("<Q", dim) for dim in reversed(shape)) + struct.pack("<IQ", 0, offset))
        body = values.tobytes()
        body += bytes(-len(body) % 32)
        bodies.append(body)
        offset += len(body)
    head = struct.pack("<IIQQ", 0x46554747, 3, len(infos), len(fields)) + b"".join(fields) + b"".join(infos)
    with open(target, "wb") as file:
        file.write(head + bytes(-len(head) % 32))
        file.writelines(bodies)


if __name__ == "__main__":
    main(*sys.argv[1:])
