#!/usr/bin/env python3
"""Trains preset llama-30m on the CPU and on the emulated Ascend, in turns, and prints ratios.

The aim is that tests on the emulated device stay quick: at least 0.7 of the CPU backend's speed.
It says nothing about silicon.

    cargo build --release
    python benches/train_emulated.py --rounds 3 --out benches/results/DATE-train-emulated.json
"""

import argparse
import json
import platform
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ["cpu", "emu-ascend:0"]


def pontoon(device: str, dtype: str, steps: int) -> dict:
    command = [
        str(ROOT / "target/release/pontoon"), "bench", "train", "--preset", "llama-30m",
        "--dtype", dtype, "--batch", "8", "--sequence", "256", "--steps", str(steps),
        "--device", device, "--json",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtypes", default="bf16,f32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {}
    ratios = {}
    for dtype in arguments.dtypes.split(","):
        for _ in range(arguments.rounds):
            for device in DEVICES:
                run = pontoon(device, dtype, arguments.steps)
                runs.setdefault(f"{device} {dtype}", []).append(run)
                print(f"{device} {dtype}: {run['tokens_per_s']:.0f} tokens/s", flush=True)
        speed = {
            device: statistics.median(run["tokens_per_s"] for run in runs[f"{device} {dtype}"])
            for device in DEVICES
        }
        ratios[dtype] = speed["emu-ascend:0"] / speed["cpu"]
        print(f"{dtype}: emulated at {ratios[dtype]:.2f} of the CPU's speed", flush=True)
    if arguments.out:
        machine = {"processor": platform.processor() or platform.machine()}
        result = {"machine": machine, "ratios": ratios, "runs": runs}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
