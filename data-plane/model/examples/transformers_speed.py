#!/usr/bin/env python3
"""Tokens a second of a checkpoint in Hugging Face transformers, measured as `--example bench` measures Penstock.

Usage: transformers_speed.py DIR [prefill|decode]   (needs torch and transformers; bf16, sdpa, two threads)
"""
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

RUNS, CONTEXT, STEPS = 5, 128, 8


def seconds(run):
    run()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


def main():
    only = sys.argv[2] if len(sys.argv) > 2 else None
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    vocabulary = model.config.vocab_size
    with torch.inference_mode():
        for length in (128, 512, 2048) if only != "decode" else ():
            ids = torch.randint(0, vocabulary, (1, length))
            median, best = seconds(lambda: model(ids, use_cache=True, logits_to_keep=1))
            print(f"prefill {length:>5}: median {length / median:>8.1f}  best {length / best:>8.1f} tokens/s", flush=True)
        for batch in (1, 4, 8, 16) if only != "prefill" else ():
            ids = torch.randint(0, vocabulary, (batch, CONTEXT))
            cache = DynamicCache()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = torch.randint(0, vocabulary, (batch, 1))

            def steps():
                for _ in range(STEPS):
                    model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

            median, best = seconds(steps)
            print(f"decode {batch:>6}: median {batch * STEPS / median:>8.1f}  best {batch * STEPS / best:>8.1f} tokens/s", flush=True)


main()
