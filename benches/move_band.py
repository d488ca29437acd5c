#!/usr/bin/env python3
"""How far apart the losses of two runs from one state are, where good devices go on with it, and
where bad ones do, as shares of the band that a move's certificate carries (docs/moving.md).

A move changes no bit but those of the other arithmetic (`move_under_load.py` compares the hashes
with those of a resumed run), so a run is stopped after 44 steps here and resumed: on the same
device for the curve that others are held against, on another one, on one with a defect that shows
from then on, or at another learning rate. Curves are kept in --folder and not computed again.

    cargo build --release
    python benches/move_band.py --seed 3 --folder curves --out benches/results/DATE-move-band.json \\
        --case 'emu-ascend:0/cpu' --case 'cpu/cpu/train.lr=1.1e-3' \\
        --case 'emu-ascend:0/emu-ascend:0/FAULT={"kind":"causal_edge","op":"aclnnFlashAttention"}'
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from move_under_load import ROOT, metrics, prepare, shares_of_band

MOVE = 44
AFTER = 200
# Of `qwen3-1m` in bf16, as `pontoon move` says it.
ROUNDING = 0.055242717434545396
# As in crates/fleet/src/supervisor/band.rs.
LOSSES, WINDOW, DEVIATIONS = 32, 16, 4.0
SETTINGS = {"preset": "qwen3-1m", "sequence": 128, "dtype": "bf16", "lr": 1e-3}


def band_of(losses: list) -> dict:
    """The band that the certificate of a move after these losses would carry."""
    last = losses[-LOSSES:]
    squares = [(a - 2 * b + c) ** 2 / 6 for a, b, c in zip(last, last[1:], last[2:])]
    scatter = math.sqrt(sum(squares) / len(squares)) / (sum(last) / len(last))
    apart = ROUNDING + DEVIATIONS * scatter * math.sqrt(2 / WINDOW)
    return {"rounding": ROUNDING, "scatter": scatter, "window": WINDOW, "deviations": DEVIATIONS, "apart": apart}


def train(program: str, folder: Path, arguments: list, faults: str = "") -> None:
    command = [program, "train", *arguments, "--in-process", "--json"]
    environment = {**os.environ, **({"PONTOON_EMU_FAULTS": faults} if faults else {})}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(done.stderr)


def curves(program: str, folder: Path, case: str) -> dict:
    """The losses of the run that stayed and of the one that went on as the case says."""
    kept = folder / (case.translate(str.maketrans({"/": "--", ":": "_", **dict.fromkeys('{}" ')})) + ".losses")
    if kept.exists():
        return json.loads(kept.read_text())
    before, after, *more = case.split("/")
    name = before.replace(":", "_")
    for run, steps in ((f"{name}-base", MOVE), (f"{name}-alone", MOVE + AFTER)):
        if not (folder / run).exists():
            train(program, folder, ["run.toml", "--dir", run, "--device", before, "--steps", str(steps)])
    shutil.copytree(folder / f"{name}-base", folder / "moved")
    settings = [part for one in more if not one.startswith("FAULT=") for part in ("--set", one)]
    faults = [one.removeprefix("FAULT=") for one in more if one.startswith("FAULT=")]
    arguments = ["moved", "--resume", "--device", after, "--steps", str(MOVE + AFTER), *settings]
    train(program, folder, arguments, *faults)
    losses = {run: [line["loss"] for line in metrics(folder / of)] for run, of in (("moved", "moved"), ("alone", f"{name}-alone"))}
    shutil.rmtree(folder / "moved")
    kept.write_text(json.dumps(losses))
    return losses


def judge(case: str, seed: int, losses: dict) -> dict:
    moved, alone = losses["moved"], losses["alone"]
    band = band_of(alone[:MOVE])
    shares = shares_of_band(band, moved, alone, MOVE)
    singles = [abs(a / b - 1) for a, b in zip(moved[MOVE:], alone[MOVE:])]
    beyond = [at + 1 for at, share in enumerate(shares) if share > 1]
    return {
        "case": case,
        "seed": seed,
        "scatter": band["scatter"],
        "band": band["apart"],
        "share_of_band_worst": max(shares),
        "worst_at_step_after_move": shares.index(max(shares)) + 1,
        "share_of_band_median": sorted(shares)[len(shares) // 2],
        "beyond_from_step_after_move": beyond[0] if beyond else None,
        "single_step_apart_worst": max(singles),
        "single_step_worst_at": singles.index(max(singles)) + 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "target/release/pontoon"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", required=True, help="FROM/TO[/KEY=VALUE][/FAULT=JSON]")
    parser.add_argument("--folder", type=Path, required=True, help="where curves are kept")
    parser.add_argument("--out", type=Path, help="results are added to those that are there")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute() / f"s{arguments.seed}"
    if not folder.exists():
        folder.mkdir(parents=True)
        prepare(folder, arguments.program, {**SETTINGS, "seed": arguments.seed})
    results = []
    if arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text())["cases"]
    for case in arguments.case:
        results.append(judge(case, arguments.seed, curves(arguments.program, folder, case)))
        print(json.dumps(results[-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"settings": SETTINGS, "move": MOVE, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
