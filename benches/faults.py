#!/usr/bin/env python3
"""Faults in real runs: what is lost to them, how soon they are found, what the watching costs.

    cargo build --release
    python benches/faults.py latency  --out benches/results/DATE-fault-latency.json
    python benches/faults.py hundred  --out benches/results/DATE-hundred-faults.json
    python benches/faults.py goodput  --out benches/results/DATE-goodput.json
    python benches/faults.py overhead --out benches/results/DATE-fleet-overhead.json

latency   one fault of every kind in a run on three workers: found after, got over after, lost
hundred   a small model with a fault in every twentieth step at random, all kinds: the hash of the
          final weights must be that of an undisturbed run
goodput   the same rate in a run whose steps take as long as a real one's
overhead  a fleet without faults against the plain loop, in turns: the time of a step
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PONTOON = os.environ.get("PONTOON", str(ROOT / "target/release/pontoon"))
KINDS = [
    ("crash", {}),
    ("hang", {}),
    ("slow", {"for_steps": 8, "factor": 8.0}),
    ("bitflip", {"tensor": "Matmul", "bit": 30}),
    ("bitflip", {"tensor": "SwiGlu", "bit": 31}),
    ("bitflip", {"tensor": "CrossEntropyBwd", "bit": 27}),
    ("bitflip", {"tensor": "weights", "bit": 29}),
    ("bitflip", {"tensor": "gradients", "bit": 25}),
    ("bitflip", {"tensor": "moments", "bit": 24}),
    ("out_of_memory", {}),
    ("memory_fault", {}),
    ("link_down", {}),
    ("disk_full", {}),
    ("damaged_snapshot", {}),
]


def pontoon(*arguments, **more):
    done = subprocess.run([PONTOON, *map(str, arguments)], capture_output=True, text=True, **more)
    if done.returncode:
        sys.exit(f"pontoon {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def prepare(folder: Path, settings: str):
    """A corpus with something to learn, its shards, and the run's settings."""
    draw = random.Random(7)
    words = "river bridge boat water stone road night light field house".split()
    lines = [" ".join(draw.choice(words) for _ in range(12)) + "." for _ in range(20_000)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    pontoon("tokenizer", "train", "corpus.txt", "--vocab", 512, "--out", "tokenizer.json", cwd=folder)
    pontoon("data", "prepare", "corpus.txt", "--tokenizer", "tokenizer.json", "--out", "shards",
            cwd=folder)
    (folder / "run.toml").write_text(settings)


def settings(preset, sequence, steps, micro_batch, micro_batches, every):
    return f"""
[model]
preset = "{preset}"
[data]
train = ["shards/*.bin"]
tokenizer = "tokenizer.json"
sequence = {sequence}
[train]
steps = {steps}
micro_batch = {micro_batch}
micro_batches = {micro_batches}
lr = 1e-3
warmup = 10
[snapshot]
every = {every}
"""


def train(folder: Path, name: str, *more):
    begun = time.perf_counter()
    text = pontoon("train", "run.toml", "--dir", name, "--json", *more, cwd=folder)
    summary = json.loads(text)
    summary["wall_s"] = round(time.perf_counter() - begun, 3)
    return summary


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def faults_of(folder: Path, name: str):
    harmless = {"started", "snapshot", "joined", "moved", "resumed", "finished"}
    return [event for event in lines(folder / name / "events.jsonl") if event["kind"] not in harmless]


def fault(worker, step, kind, **more):
    text = f'[[fault]]\nworker = {worker}\nstep = {step}\nkind = "{kind}"\n'
    for key, value in more.items():
        text += f"{key} = {json.dumps(value)}\n"
    return text


def latency(folder: Path):
    steps = 20 + 14 * len(KINDS)
    prepare(folder, settings("qwen3-1m", 128, steps, 4, 8, 7))
    plan = "".join(
        fault(place % 3, 20 + 14 * place, kind, **more) for place, (kind, more) in enumerate(KINDS)
    )
    (folder / "chaos.toml").write_text(plan)
    plain = train(folder, "plain")
    run = train(folder, "run", "--workers", 3, "--chaos", "chaos.toml", "--set", "fleet.audit=0.02")
    keys = ["step", "kind", "worker", "cause", "detected_ms", "recovery_ms", "lost_micro_batches"]
    table = [{key: event.get(key) for key in keys} for event in faults_of(folder, "run")]
    steps_ms = [line["step_ms"] for line in lines(folder / "run" / "metrics.jsonl")]
    return {
        "equal": run["weights_blake3"] == plain["weights_blake3"],
        "step_ms_median": statistics.median(steps_ms),
        "planned": [{"kind": kind, **more} for kind, more in KINDS],
        "faults": table,
        "summary": run,
    }


def account(run):
    """Every second is useful or lost to a cause: what is open should be nothing."""
    lost = sum(run["lost_s"].values())
    return {"useful_s": run["useful_s"], "lost_s": lost, "wall_s": run["wall_s"],
            "open_s": run["wall_s"] - run["useful_s"] - lost}


def at_random(folder: Path, preset, sequence, steps, micro_batch, workers, every):
    prepare(folder, settings(preset, sequence, steps, micro_batch, 8, every))
    (folder / "chaos.toml").write_text("[random]\nseed = 7\nrate = 0.05\n")
    plain = train(folder, "plain")
    run = train(folder, "run", "--workers", workers, "--chaos", "chaos.toml", "--set",
                "fleet.audit=0.01")
    events = faults_of(folder, "run")
    kinds = {}
    for event in events:
        kinds[event["kind"]] = kinds.get(event["kind"], 0) + 1
    steps_ms = [line["step_ms"] for line in lines(folder / "run" / "metrics.jsonl")]
    return {
        "settings": {"preset": preset, "steps": steps, "workers": workers, "rate": 0.05, "seed": 7},
        "equal": run["weights_blake3"] == plain["weights_blake3"],
        "weights_blake3": run["weights_blake3"],
        "faults": run["faults"],
        "found": kinds,
        "step_ms_median": statistics.median(steps_ms),
        "goodput": run["goodput"],
        "lost_s": run["lost_s"],
        "account": account(run),
        "summary": run,
    }


def overhead(folder: Path):
    """The plain loop, and a fleet of one worker on all cores and of two on a core each, in turns."""
    prepare(folder, settings("llama-30m", 256, 6, 4, 8, 3))
    kinds = {
        "plain": ["--set", "fleet.checks=false"],
        "plain with checks": [],
        "one worker": ["--workers", 1],
        "one worker without checks": ["--workers", 1, "--set", "fleet.checks=false"],
        "two workers, audits of 1%": ["--workers", 2, "--set", "fleet.audit=0.01"],
    }
    times = {name: [] for name in kinds}
    for round in range(ROUNDS):
        for name, more in kinds.items():
            dir = f"{name.replace(' ', '-')}-{round}"
            train(folder, dir, *more)
            of_run = [line["step_ms"] for line in lines(folder / dir / "metrics.jsonl")]
            times[name] += of_run[1:]
    medians = {name: statistics.median(of) for name, of in times.items()}
    ratios = {name: median / medians["plain"] for name, median in medians.items()}
    return {"model": "llama-30m, 8 x 4 x 256 tokens a step", "step_ms": times, "ratios": ratios}


ROUNDS = 3


def main():
    global ROUNDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["latency", "hundred", "goodput", "overhead"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    ROUNDS = arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if arguments.what == "latency":
            result = latency(folder)
        elif arguments.what == "hundred":
            result = at_random(folder, "qwen3-1m", 64, arguments.steps or 2000, 1, 3, 50)
        elif arguments.what == "goodput":
            result = at_random(folder, "llama-30m", 128, arguments.steps or 80, 1, 2, 20)
        else:
            result = overhead(folder)
    result["machine"] = {"processor": platform.processor(), "cores": os.cpu_count()}
    result["date"] = time.strftime("%Y-%m-%d")
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    shown = {key: value for key, value in result.items() if key not in ("summary", "step_ms")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
