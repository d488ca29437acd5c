#!/usr/bin/env python3
"""Trains the same model on the same shapes with Pontoon and with PyTorch, in turns, and prints ratios.

The model is preset llama-30m: width 512, 8 layers, 8 heads, SwiGLU 1376, vocabulary 8192, tied
head. A step is forward, backward, clipping and AdamW. PyTorch runs transformers' LlamaForCausalLM,
plain and compiled; its bf16 is autocast. Pontoon runs before each of PyTorch's runs, so that both
meet the same weather on a shared machine.

    cargo build --release
    pip install torch transformers
    python benches/train_vs_pytorch.py --dtype f32 --rounds 3 --out benches/results/DATE-train.json
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH, SEQUENCE, STEPS = 8, 256, 8


def pytorch(mode: str) -> dict:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, intermediate_size=1376, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    ids = torch.randint(0, 8192, (BATCH, SEQUENCE))
    half = mode.startswith("bf16")

    def loss_of(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    run = torch.compile(loss_of) if mode.endswith("compiled") else loss_of
    times = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        run(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_s": BATCH * SEQUENCE / statistics.median(times[2:]),
        "peak_rss_bytes": rss,
        "torch": torch.__version__,
    }


def pontoon(dtype: str, recompute: str) -> dict:
    command = [
        ROOT / "target/release/pontoon", "bench", "train", "--preset", "llama-30m", "--dtype", dtype,
        "--batch", str(BATCH), "--sequence", str(SEQUENCE), "--steps", str(STEPS + 1),
        "--recompute", recompute, "--json",
    ]
    return json.loads(subprocess.check_output(command))


def other(mode: str) -> dict:
    command = [sys.executable, __file__, "--one", mode]
    return json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["f32", "bf16"], help="only this one; both without it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(pytorch(arguments.one)))
        return
    dtypes = [arguments.dtype] if arguments.dtype else ["bf16", "f32"]
    results, speed, ratios = {}, {}, {}
    for index in range(arguments.rounds):
        for dtype in dtypes:
            recompute = "nothing" if dtype == "bf16" else "cheap"
            for mode in [f"{dtype} compiled", dtype]:
                pair = {f"pontoon {dtype}": pontoon(dtype, recompute), f"pytorch {mode}": other(mode)}
                for name, result in pair.items():
                    results.setdefault(name, []).append(result)
                    print(f"round {index + 1}  {name:22} {result['tokens_per_s']:8.0f} tokens/s  "
                          f"{result['peak_rss_bytes'] / 2**20:6.0f} MiB", flush=True)
    for name, runs in results.items():
        speed[name] = statistics.median(run["tokens_per_s"] for run in runs)
    for dtype in dtypes:
        for mode in [f"{dtype} compiled", dtype]:
            ratios[mode] = speed[f"pontoon {dtype}"] / speed[f"pytorch {mode}"]
            print(f"Pontoon trains {ratios[mode]:.2f} times as fast as PyTorch {mode}")
    if arguments.out:
        machine = {"processor": platform.processor() or platform.machine()}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                machine["processor"] = line.split(":")[1].strip()
        text = json.dumps({"machine": machine, "ratios": ratios, "runs": results}, indent=1)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
