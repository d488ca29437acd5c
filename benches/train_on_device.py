#!/usr/bin/env python3
"""Trains the same models on the same accelerator with Pontoon and with PyTorch, and prints tokens/s.

A step is forward, backward, clipping and AdamW on one batch. Pontoon runs `bench train`; PyTorch runs
transformers' model of the same extents with random weights, plain and compiled; its bf16 is autocast
over f32 weights. The two take turns on a machine that does nothing else.

    cargo build --release
    pip install torch transformers
    python benches/train_on_device.py --device cuda:0 --out benches/results/DATE-train-device.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
# Longest one of PyTorch's runs may take: compiling takes most of it.
SECONDS_MAX = 60
MODELS = {
    "llama-30m": {"batch": 8, "sequence": 256, "kind": "Llama", "config": {
        "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 1376}},
    "qwen3-0.6b": {"batch": 4, "sequence": 1024, "kind": "Qwen3", "config": {
        "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072}},
}


def pytorch(name: str, mode: str, device: str) -> dict:
    import torch
    import transformers

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = MODELS[name]
    config = getattr(transformers, model["kind"] + "Config")(
        tie_word_embeddings=True, max_position_embeddings=2048, **model["config"])
    net = getattr(transformers, model["kind"] + "ForCausalLM")(config).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    ids = torch.randint(0, config.vocab_size, (model["batch"], model["sequence"]), device=device)
    half = mode.startswith("bf16")

    def loss_of(ids):
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=half):
            return net(input_ids=ids, labels=ids, use_cache=False).loss

    run = torch.compile(loss_of) if mode.endswith("compiled") else loss_of
    times = []
    for _ in range(STEPS + 4):
        start = time.perf_counter()
        run(ids).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    tokens = model["batch"] * model["sequence"]
    return {"tokens_per_s": tokens / statistics.median(times[4:]), "torch": torch.__version__,
            "memory_bytes": torch.cuda.max_memory_allocated()}


def pontoon(program: str, name: str, dtype: str, device: str) -> dict:
    model = MODELS[name]
    command = [program, "bench", "train", "--preset", name, "--dtype", dtype, "--batch", str(model["batch"]),
               "--sequence", str(model["sequence"]), "--steps", str(STEPS + 1), "--device", device, "--json"]
    result = json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))
    return {key: result[key] for key in ("tokens_per_s", "gemm_peak_fraction", "gemm_peak_flops", "arena_bytes")}


def other(name: str, mode: str, device: str) -> dict:
    command = [sys.executable, __file__, "--one", name, "--mode", mode, "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {SECONDS_MAX} s"}
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-300:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default=str(ROOT / "target/release/pontoon"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--beside", type=int, default=1, help="0 leaves PyTorch out")
    parser.add_argument("--case", action="append", help="MODEL/DTYPE; several times")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(pytorch(arguments.one, arguments.mode, arguments.device)))
        return
    modes = ["", "-compiled"] if arguments.beside else []
    cases = arguments.case or ["llama-30m/bf16", "llama-30m/f32", "qwen3-0.6b/bf16"]
    results = []
    for case in cases:
        name, dtype = case.split("/")
        result = {"case": case, "pontoon": pontoon(arguments.program, name, dtype, arguments.device)}
        for mode in modes:
            result["pytorch-" + dtype + mode] = other(name, dtype + mode, arguments.device)
        print(json.dumps(result), flush=True)
        results.append(result)
        report = {"date": time.strftime("%Y-%m-%d"), "device": arguments.device, "cases": results}
        if arguments.out is None:
            continue
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
