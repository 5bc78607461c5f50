#!/usr/bin/env python3
"""Makes the golden checkpoints and what transformers says about them.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers safetensors
    /tmp/golden/bin/python tests/golden/regenerate.py [name...]

For each family, or for those named, it writes tests/golden/<name>/: a random checkpoint of a few thousand weights (bf16, seeded) in the
Hugging Face layout, and golden.json with, for each prompt, the float32 logits of its last position and the ids of
greedy decoding, computed on the CPU with the weights widened to float32 and plain ("eager") attention. Where two
ids are nearly as likely, an implementation that is right may choose the other one, so the script refuses prompts
that come to such a step.
"""
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 12
SMALLEST_MARGIN = 0.01
COMMON = dict(
    vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=0, bos_token_id=1)
FAMILIES = {
    # Untied, with biases and stretched frequencies: every switch of the family.
    "llama": LlamaConfig(
        **COMMON, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64)),
    "llama-linear": LlamaConfig(
        **COMMON, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "qwen2": Qwen2Config(
        **COMMON, rms_norm_eps=1e-6, tie_word_embeddings=True, use_sliding_window=False,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    "qwen3": Qwen3Config(
        **COMMON, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True, use_sliding_window=False,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    # Shorter than a page's and a block's prompts, and no divisor of either.
    "mistral": MistralConfig(
        **COMMON, head_dim=8, rms_norm_eps=1e-5, sliding_window=23,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    # One layer that sees everything, one with a window.
    "qwen2-window": Qwen2Config(
        **COMMON, rms_norm_eps=1e-6, tie_word_embeddings=True, use_sliding_window=True, sliding_window=40,
        max_window_layers=1, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    "qwen3-yarn": Qwen3Config(
        **COMMON, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True, use_sliding_window=False,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=8.0, original_max_position_embeddings=64)),
    # Its longer prompts go beyond the 64 positions.
    "llama-dynamic": LlamaConfig(
        **COMMON | dict(max_position_embeddings=64), head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)),
}


def randomise(model, generator):
    """Weights that give varied tokens: wide embeddings, norms near 1, biases that matter."""
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.1 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif "embed" in name or "lm_head" in name:
            value = noise * 2.5 / weight.shape[1] ** 0.5
        else:
            value = noise * 2.0 / weight.shape[1] ** 0.5
        weight.data = value.to(torch.bfloat16).to(torch.float32)


def prompt(length, generator):
    return torch.randint(3, COMMON["vocab_size"], (length,), generator=generator).tolist()


def last_logits(model, ids):
    """Logits of the last position."""
    if model.config.rope_parameters["rope_type"] != "dynamic":
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    # Frequencies follow the length so far, and keys that are cached stay as they are: token by token, then. The
    # first tokens go together, since only a step that is shorter than the original context resets the frequencies.
    out = model(torch.tensor([ids[:32]]), use_cache=True)
    for at in range(32, len(ids)):
        out = model(torch.tensor([ids[at:at + 1]]), past_key_values=out.past_key_values, use_cache=True)
    return out.logits[0, -1]


def continue_greedily(model, ids):
    """(logits of the last position, greedy ids), or None where a step is nearly a tie."""
    first, chosen = None, []
    for _ in range(NEW_TOKENS):
        logits = last_logits(model, ids + chosen)
        first = logits if first is None else first
        top = logits.topk(2).values
        if top[0] - top[1] < SMALLEST_MARGIN:
            return None
        chosen.append(int(logits.argmax()))
    return first, chosen


def cases(model, generator):
    """Prompts of lengths around a page, a block of attention and more."""
    for length in (1, 5, 16, 17, 63, 64, 65, 100):
        while True:
            ids = prompt(length, generator)
            result = continue_greedily(model, ids)
            if result:
                break
        # Nine digits are more than a float32 has.
        yield dict(ids=ids, logits=[float(f"{x:.9g}") for x in result[0].tolist()], greedy=result[1])


def main():
    for seed, (name, config) in enumerate(FAMILIES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        generator = torch.Generator().manual_seed(seed)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model, generator)
        out = HERE / name
        out.mkdir(exist_ok=True)
        document = config.to_dict() | dict(architectures=[type(model).__name__], torch_dtype="bfloat16")
        for key in ("dtype", "transformers_version", "_name_or_path"):
            document.pop(key, None)
        (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        weights = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight")
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            golden = dict(cases=list(cases(model, generator)))
        (out / "golden.json").write_text(json.dumps(golden) + "\n")
        size = sum(file.stat().st_size for file in out.iterdir())
        print(f"{name}: {size} bytes")


if __name__ == "__main__":
    main()
