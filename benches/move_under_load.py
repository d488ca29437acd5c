#!/usr/bin/env python3
"""Moves a live run to other devices and holds its losses against those of the same run left alone.

Each case starts a run on two workers, asks `pontoon move` for other devices once it has done some
steps, lets it go on for 200 more, and trains the same settings twice more: without a move, and
stopped at that step and resumed on the other devices. Printed and written: how long the move took,
the largest difference of the losses' running means as a share of the certificate's band and where
it was, and whether the final weights have the same hash as those of either run.

    cargo build --release
    python benches/move_under_load.py --out benches/results/DATE-move.json
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = "zero one two three four five six seven eight nine".split()
SETTINGS = """
[model]
preset = "{preset}"
[data]
train = ["shards/*.bin"]
tokenizer = "tokenizer.json"
sequence = {sequence}
[train]
steps = 1000000
micro_batch = 2
micro_batches = 4
dtype = "{dtype}"
lr = {lr}
seed = {seed}
warmup = 10
schedule = "constant"
[snapshot]
every = 50
"""


def prepare(folder: Path, program: str, settings: dict) -> None:
    lines = []
    for n in range(4000):
        a, b, c = n % 10, n // 10 % 10, n // 100
        text = f"After {WORDS[a]} and {WORDS[b]} and {c} comes {WORDS[(a + b + c) % 10]} {(a * b + c) % 97}.\n"
        lines.append(json.dumps({"text": text}))
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "run.toml").write_text(SETTINGS.format(**settings))
    quiet = {"cwd": folder, "check": True, "capture_output": True}
    subprocess.run([program, "tokenizer", "train", "corpus.jsonl", "--vocab", "400", "--out", "tokenizer.json"], **quiet)
    subprocess.run([program, "data", "prepare", "corpus.jsonl", "--tokenizer", "tokenizer.json", "--out", "shards"], **quiet)


def metrics(run: Path) -> list:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def await_step(run: Path, step: int, child: subprocess.Popen) -> None:
    while not (lines := metrics(run)) or lines[-1]["step"] < step:
        if child.poll() is not None:
            sys.exit(f"the run ended: {child.stderr.read()}")
        time.sleep(0.05)


def start(folder: Path, program: str, name: str, devices: list, more: list) -> subprocess.Popen:
    given = [part for device in devices for part in ("--device", device)]
    command = [program, "train", "run.toml", "--dir", name, "--json", *given, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, **pipes)


def summary(child: subprocess.Popen) -> dict:
    out, errors = child.communicate()
    if child.returncode != 0:
        sys.exit(errors)
    return json.loads(out)


def shares_of_band(band: dict, run: list, alone: list, step: int) -> list:
    """How far apart running means of two curves are, as shares of what the certificate allows."""
    shares = []
    for end in range(step + 1, min(len(run), len(alone)) + 1):
        begin = max(step, end - band["window"])
        apart = abs(sum(run[begin:end]) / sum(alone[begin:end]) - 1)
        allowed = band["rounding"] + band["deviations"] * band["scatter"] * (2 / (end - begin)) ** 0.5
        shares.append(apart / allowed)
    return shares


def measure(program: str, settings: dict, before: list, after: list, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, program, settings)
        child = start(folder, program, "moved", before, ["--set", "fleet.audit=0.05"])
        await_step(folder / "moved", 40, child)
        asked = time.perf_counter()
        command = [program, "move", "moved", "--to", ",".join(after), "--json"]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        answered = time.perf_counter() - asked
        certificate = json.loads(done.stdout)["certificate"]
        step = certificate["step"]
        await_step(folder / "moved", step + steps, child)
        child.send_signal(2)
        moved = summary(child)
        alone = start(folder, program, "alone", before, ["--steps", str(moved["steps"])])
        alone = summary(alone)
        start(folder, program, "resumed", before, ["--steps", str(step)]).communicate()
        more = ["--steps", str(moved["steps"]), "--resume"]
        resumed = summary(start(folder, program, "resumed", after, more))
        losses = [[line["loss"] for line in metrics(folder / run)] for run in ("moved", "alone")]
        times = [line["step_ms"] for line in metrics(folder / "moved")]
    if len(losses[0]) != len(losses[1]) or len(losses[0]) != moved["steps"]:
        sys.exit("a step is missing")
    apart = [abs(a - b) / max(abs(b), 1e-3) for a, b in zip(*losses)]
    shares = shares_of_band(certificate["band"], *losses, step)[:steps]
    return {
        "from": before,
        "to": after,
        "step": step,
        "steps_after": len(shares),
        "loss_before_move": losses[0][step - 1],
        "last_loss": losses[0][-1],
        "last_loss_unmoved": losses[1][-1],
        "apart_before_move": max(apart[:step]),
        "apart_worst": max(apart[step:]),
        "share_of_band_worst": max(shares),
        "worst_at_step_after_move": shares.index(max(shares)) + 1,
        "share_of_band_median": sorted(shares)[len(shares) // 2],
        "same_hash": moved["weights_blake3"] == alone["weights_blake3"],
        "same_hash_as_resumed": moved["weights_blake3"] == resumed["weights_blake3"],
        "faults": moved["faults"],
        "usual_step_ms": sorted(times[10:step - 1])[(step - 11) // 2],
        "usual_step_ms_after": sorted(times[step + 1:])[len(times[step + 1:]) // 2],
        "first_step_ms": times[step],
        "worst_step_ms_while_tried": max(times[max(step - 12, 10):step]),
        "pause_ms": certificate["pause_ms"],
        "trial_ms": certificate["trial_ms"],
        "load_ms": certificate["load_ms"],
        "answered_s": answered,
        "gradient_error": max(trial["gradient_error"] for trial in certificate["trials"]),
        "limits": certificate["limits"],
        "band": certificate["band"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default=str(ROOT / "target/release/pontoon"))
    parser.add_argument("--steps", type=int, default=200, help="steps after the move")
    parser.add_argument("--preset", default="qwen3-1m")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--lr", type=float, default=1e-3, help="that of the certificate's band")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", help="FROM,FROM/TO,TO; several times")
    parser.add_argument("--note", help="kept with the result")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cases = arguments.case or [
        "cpu,cpu/cpu:isa=avx2,cpu:isa=avx2",
        "cpu,cpu/cpu,cpu",
        "emu-ascend:0,emu-ascend:0/cpu,cpu",
    ]
    settings = {"preset": arguments.preset, "sequence": arguments.sequence, "dtype": arguments.dtype, "lr": arguments.lr, "seed": arguments.seed}
    results = []
    for case in cases:
        before, after = (side.split(",") for side in case.split("/"))
        result = measure(arguments.program, settings, before, after, arguments.steps)
        print(json.dumps(result, indent=1), flush=True)
        results.append(result)
    if arguments.out:
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
            "settings": settings,
            "note": arguments.note,
            "cases": results,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
