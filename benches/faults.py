#!/usr/bin/env python3
"""Faults in real runs: what is lost to them, how soon they are found, what the watching costs.

    cargo build --release
    python benches/faults.py MODE --out benches/results/DATE-MODE.json

latency   every kind of fault in runs on three workers: found after, got over after, lost
hundred   a small model with a fault in every twentieth step at random, all kinds: the hash of the
          final weights must be that of an undisturbed run
goodput   the same rate in a run whose steps take as long as a real one's
overhead  fleets without faults against the plain loop, some steps of each in turns
checks    a step with checks against one without, in turns in each of two processes, each of one
          thread and on a core of its own
clean     10,000 steps of a tiny model with every check and with audits: nothing is accused
flips     sign and exponent bits of products, weights and gradients, flipped one by one in a run on
          three workers: found before the step is applied, without effect, or missed
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PONTOON = os.environ.get("PONTOON", str(ROOT / "target/release/pontoon"))
KINDS = [
    ("crash", {}),
    ("hang", {}),
    ("slow", {"for_steps": 24, "factor": 8.0}),
    ("bitflip", {"tensor": "Matmul", "bit": 30}),
    ("bitflip", {"tensor": "SwiGlu", "bit": 31}),
    ("bitflip", {"tensor": "Attention", "bit": 27}),
    ("bitflip", {"tensor": "weights", "bit": 29}),
    ("bitflip", {"tensor": "gradients", "bit": 25}),
    ("bitflip", {"tensor": "moments", "bit": 24}),
    ("out_of_memory", {}),
    ("memory_fault", {}),
    ("link_down", {}),
    ("disk_full", {}),
    ("damaged_snapshot", {}),
]


# A model whose steps take a few milliseconds.
TINY = {
    "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# A layer as wide as those of models of a billion parameters.
WIDE = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 1, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 512,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
CONFIGS = {"tiny": TINY, "wide": WIDE}


def pontoon(*arguments, **more):
    done = subprocess.run([PONTOON, *map(str, arguments)], capture_output=True, text=True, **more)
    if done.returncode:
        sys.exit(f"pontoon {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def prepare(folder: Path, settings: str, config=TINY):
    """A corpus with something to learn, its shards, and the run's settings."""
    draw = random.Random(7)
    words = "river bridge boat water stone road night light field house".split()
    lines = [" ".join(draw.choice(words) for _ in range(12)) + "." for _ in range(20_000)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    pontoon("tokenizer", "train", "corpus.txt", "--vocab", 512, "--out", "tokenizer.json", cwd=folder)
    pontoon("data", "prepare", "corpus.txt", "--tokenizer", "tokenizer.json", "--out", "shards",
            cwd=folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.toml").write_text(settings)


def settings(preset, sequence, steps, micro_batch, micro_batches, every):
    model = 'config = "config.json"' if preset in CONFIGS else f'preset = "{preset}"'
    return f"""
[model]
{model}
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
    summary["process_s"] = round(time.perf_counter() - begun, 3)
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


def spread(values):
    values = sorted(value for value in values if value is not None)
    if not values:
        return None
    return {"median": statistics.median(values), "max": values[-1], "count": len(values)}


def found_by(events, planned):
    """The event that tells of a planned fault: the first about its worker from its step on."""
    of_disk = planned["kind"] in ("disk_full", "damaged_snapshot")
    for event in events:
        mine = event["kind"] == "snapshot_failed" if of_disk else event.get("worker") == planned["worker"]
        if mine and planned["step"] <= event["step"] + 1 and event["step"] < planned["until"]:
            return event
    return None


def latency(folder: Path):
    """Two halves of the kinds in a run each: a device that is taken out three times stays out."""
    apart, first = 14, 20
    halves = [KINDS[::2], KINDS[1::2]]
    steps = first + apart * len(halves[0])
    prepare(folder, settings("qwen3-1m", 128, steps, 4, 8, 7))
    plain = train(folder, "plain", "--in-process")
    rows, steps_ms, equal, summaries = {}, [], True, []
    for round in range(ROUNDS):
        for half, kinds in enumerate(halves):
            plan, listed = "", []
            for place, (kind, more) in enumerate(kinds):
                worker, step = (place + round) % 3, first + apart * place
                plan += fault(worker, step, kind, **more)
                until = step + apart
                listed.append({"kind": kind, "worker": worker, "step": step, "until": until, **more})
            (folder / "chaos.toml").write_text(plan)
            name = f"run-{round}-{half}"
            run = train(folder, name, "--workers", 3, "--chaos", "chaos.toml")
            equal &= run["weights_blake3"] == plain["weights_blake3"]
            summaries.append(run)
            steps_ms += [line["step_ms"] for line in lines(folder / name / "metrics.jsonl")]
            events = faults_of(folder, name)
            for planned in listed:
                what = planned["kind"] + (f" in {planned['tensor']}" if "tensor" in planned else "")
                row = rows.setdefault(what, {"struck": 0, "events": []})
                row["struck"] += 1
                if event := found_by(events, planned):
                    row["events"].append(event)
    table = {
        what: {
            "struck": row["struck"],
            "found": len(row["events"]),
            "detected_ms": spread(event.get("detected_ms") for event in row["events"]),
            "recovery_ms": spread(event.get("recovery_ms") for event in row["events"]),
            "lost_micro_batches": spread(event.get("lost_micro_batches") for event in row["events"]),
            "causes": sorted({event.get("cause", "") for event in row["events"]})[:3],
        }
        for what, row in rows.items()
    }
    return {
        "settings": {"preset": "qwen3-1m", "workers": 3, "rounds": ROUNDS, "micro_batches": 8,
                     "tokens_a_micro_batch": 512},
        "equal": equal,
        "step_ms_median": statistics.median(steps_ms),
        "table": table,
        "summary": summaries,
    }


def account(run):
    """Every second is useful or lost to a cause: what is open should be nothing."""
    lost = sum(run["lost_s"].values())
    return {"useful_s": run["useful_s"], "lost_s": lost, "wall_s": run["wall_s"],
            "open_s": run["wall_s"] - run["useful_s"] - lost}


def plan_at_random(steps, workers, seed=7, rate=0.05):
    """As many faults as the rate makes, each of any kind; a plan's own draws leave some of the
    disk's out, so that no two snapshots in a row fail."""
    draw = random.Random(seed)
    listed = []
    for step in sorted(draw.sample(range(5, steps - 20), round(steps * rate))):
        kind = draw.choice(["crash", "hang", "slow", "bitflip", "out_of_memory", "memory_fault",
                            "link_down", "disk_full", "damaged_snapshot"])
        more = {}
        if kind == "slow":
            more = {"for_steps": draw.randint(1, 3), "factor": 5.0}
        if kind == "bitflip":
            tensor = draw.choice(["Matmul", "weights", "gradients", "moments", "SwiGlu"])
            more = {"tensor": tensor, "bit": draw.randint(23, 31)}
        listed.append((kind, fault(draw.randrange(workers), step, kind, **more)))
    return listed


def at_random(folder: Path, preset, sequence, steps, micro_batch, workers, every):
    prepare(folder, settings(preset, sequence, steps, micro_batch, 8, every))
    plan = plan_at_random(steps, workers)
    (folder / "chaos.toml").write_text("".join(text for _, text in plan))
    planned = {}
    for kind, _ in plan:
        planned[kind] = planned.get(kind, 0) + 1
    plain = train(folder, "plain", "--in-process")
    run = train(folder, "run", "--workers", workers, "--chaos", "chaos.toml", "--set",
                "fleet.audit=0.01")
    events = faults_of(folder, "run")
    kinds = {}
    for event in events:
        kinds[event["kind"]] = kinds.get(event["kind"], 0) + 1
    losses = [[line["loss"] for line in lines(folder / name / "metrics.jsonl")]
              for name in ("plain", "run")]
    steps_ms = [line["step_ms"] for line in lines(folder / "run" / "metrics.jsonl")]
    return {
        "settings": {"preset": preset, "sequence": sequence, "steps": steps, "workers": workers,
                     "rate": 0.05, "seed": 7},
        "equal": run["weights_blake3"] == plain["weights_blake3"],
        "equal_losses": losses[0] == losses[1],
        "weights_blake3": run["weights_blake3"],
        "planned_count": len(plan),
        "planned": planned,
        "faults": run["faults"],
        "found": kinds,
        "step_ms_median": statistics.median(steps_ms),
        "goodput": run["goodput"],
        "lost_s": run["lost_s"],
        "account": account(run),
        "summary": run,
    }


def clean(folder: Path, steps):
    """Nothing is wrong: whoever is accused is accused falsely."""
    prepare(folder, settings("tiny", 32, steps, 1, 4, 500))
    plain = train(folder, "plain", "--in-process")
    run = train(folder, "run", "--workers", 2, "--set", "fleet.audit=0.05")
    alarms = {}
    for event in faults_of(folder, "run"):
        alarms.setdefault(event["kind"], []).append(event)
    return {
        "settings": {"steps": steps, "workers": 2, "audit": 0.05, "checks": True, "model": TINY},
        "equal": run["weights_blake3"] == plain["weights_blake3"],
        "alarms": {kind: len(of) for kind, of in alarms.items()},
        "alarms_told": alarms,
        "goodput": run["goodput"],
        "account": account(run),
        "summary": run,
    }


def flips(folder: Path, count, within):
    """One flip in every 60th step, the workers in turn: a device is forgiven a flip after a hundred
    steps, so that it never stays out."""
    apart, first = 60, 10
    steps = first + apart * (count + 1)
    prepare(folder, settings("tiny", 32, steps, 1, 4, 500))
    draw = random.Random(11)
    listed, plan = [], ""
    for place in range(count):
        tensor = ("Matmul", "weights", "gradients")[place % 3]
        # Each of the nine bits and each worker meets each kind of tensor.
        worker, bit = (place + place // 3) % 3, 23 + place // 9 % 9
        step = first + apart * place + draw.randrange(8)
        listed.append({"kind": "bitflip", "worker": worker, "step": step, "until": step + 20,
                       "tensor": tensor, "bit": bit})
        plan += fault(worker, step, "bitflip", tensor=tensor, bit=bit)
    (folder / "chaos.toml").write_text(plan)
    plain = train(folder, "plain", "--in-process")
    run = train(folder, "run", "--workers", 3, "--chaos", "chaos.toml")
    events = [event for event in faults_of(folder, "run") if event["kind"] == "corrupt"]
    table, open_ = {}, []
    for planned in listed:
        row = table.setdefault(planned["tensor"], {"flipped": 0, "found": 0, "detected_ms": []})
        row["flipped"] += 1
        if event := found_by(events, planned):
            row["found"] += 1
            row["detected_ms"].append(event.get("detected_ms"))
        else:
            open_.append(planned)
    for row in table.values():
        row["detected_ms"] = spread(row["detected_ms"])
    equal = run["weights_blake3"] == plain["weights_blake3"]
    return {
        "settings": {"flips": count, "bits": "sign and exponent", "workers": 3, "steps": steps},
        "equal": equal,
        "table": table,
        # With equal weights at the end these changed nothing.
        "without_effect" if equal else "missed_or_without_effect": open_,
        "share_found": sum(row["found"] for row in table.values()) / count,
        "events": len(events),
        "goodput": run["goodput"],
        "within_a_step": sweep(within) if within else None,
        "summary": run,
    }


def sweep(count):
    """Bits in the sums of products before they are stored, and in every operation's results, as a
    test of the training crate flips and counts them; every step's outcome is compared."""
    command = ["cargo", "test", "-p", "pontoon-train", "--test", "flips", "--", "--nocapture"]
    environment = {**os.environ, "PONTOON_FLIPS": str(count)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = re.findall(r"^(\S+): (.+): (\d+) flips, (\d+) found, (\d+) without effect$",
                       done.stdout, re.MULTILINE)
    return [{"model": model, "what": what, "flips": int(all), "found": int(caught),
             "without_effect": int(harmless)} for model, what, all, caught, harmless in found]


# Steps of some seconds: a snapshot in ten minutes or so.
SNAPSHOT_EVERY = 100
# The pause between two turns makes a worker with fewer micro-batches look slower: the second step of
# a turn has none, and the next turn's shares follow from it.
STEPS_PER_TURN = 2


class Taking:
    """A run that works only while it is its turn: its processes are stopped between turns, all of
    them in the middle of their first micro-batch, so that none looks slower than another."""

    def __init__(self, folder: Path, name: str, *more):
        self.metrics, self.size, self.begun_s = folder / name / "metrics.jsonl", 0, 0.0
        command = [PONTOON, "train", "run.toml", "--dir", name, "--json", *map(str, more)]
        self.told = open(folder / f"{name}.txt", "w+")
        # In a group of its own, to which its workers belong too.
        self.process = subprocess.Popen(command, cwd=folder, stdout=self.told, stderr=self.told,
                                        start_new_session=True)

    def written(self):
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def turn(self):
        """Goes on until some steps are over and a little of the next is done; the time of one."""
        os.killpg(self.process.pid, signal.SIGCONT)
        begun = time.perf_counter()
        for _ in range(STEPS_PER_TURN):
            while (size := self.written()) == self.size:
                if self.process.poll() is not None:
                    self.told.seek(0)
                    sys.exit(f"{self.metrics.parent.name} ended: {self.told.read().strip()}")
                time.sleep(0.002)
            self.size = size
        over = time.perf_counter()
        time.sleep(0.1)
        os.killpg(self.process.pid, signal.SIGSTOP)
        if self.written() != size:
            sys.exit("the next step was over before it could be stopped: more micro-batches")
        turn_s = over - begun + self.begun_s
        self.begun_s = time.perf_counter() - over
        return 1000 * turn_s / STEPS_PER_TURN

    def end(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.told.close()


def overhead(folder: Path, model: str, micro_batches: int, turns: int, without: list):
    """The plain loop and fleets without faults, some steps of each in turns, while the others stand
    still; one worker has all cores, two have half."""
    text = settings(model, 256, 1_000_000, 4, micro_batches, 1_000_000)
    prepare(folder, text, CONFIGS.get(model, TINY))
    kinds = {
        "plain": ["--in-process", "--set", "fleet.checks=false"],
        "one worker without checks": ["--set", "fleet.checks=false"],
        "one worker": [],
        "two workers without checks": ["--workers", 2, "--set", "fleet.checks=false"],
        "two workers": ["--workers", 2, "--set", "fleet.audit=0"],
        "two workers, audits of 1%": ["--workers", 2, "--set", "fleet.audit=0.01"],
        "one worker, snapshots": ["--set", f"snapshot.every={SNAPSHOT_EVERY}"],
        "two workers, audits of 1%, snapshots": [
            "--workers", 2, "--set", "fleet.audit=0.01", "--set", f"snapshot.every={SNAPSHOT_EVERY}"],
    }
    kinds = {name: more for name, more in kinds.items() if name not in without}
    runs, times = {}, {name: [] for name in kinds}
    try:
        for name, more in kinds.items():
            runs[name] = Taking(folder, name.replace(" ", "-"), *more)
            # The first steps load and find out how fast the workers are.
            runs[name].turn()
        for turn in range(turns):
            # A shared machine is a fifth slower in some minutes: nobody always goes first.
            for name in list(kinds)[:: -1 if turn % 2 else 1]:
                times[name].append(runs[name].turn())
        alarms = {name: [event["kind"] for event in faults_of(folder, name.replace(" ", "-"))]
                  for name in kinds}
    finally:
        for run in runs.values():
            run.end()
    ratios = {name: [one / plain for one, plain in zip(of, times["plain"])]
              for name, of in times.items()}
    # Half of what lies between the quartiles is 0.67 standard deviations of one ratio.
    spread = lambda of: (of[2] - of[0]) / 1.35
    quartiles = {name: statistics.quantiles(of, n=4) for name, of in ratios.items()}
    return {"model": f"{model}, {micro_batches} x 4 x 256 tokens a step, "
                     f"{turns} turns of {STEPS_PER_TURN} steps",
            "what": "a step over the plain loop's of the same turn: the median (and so without steps "
                    "that are audited), its standard error, and the mean",
            "ratio": {name: of[1] for name, of in quartiles.items()},
            "standard_error": {name: 1.25 * spread(of) / len(ratios[name]) ** 0.5
                               for name, of in quartiles.items()},
            "mean_ratio": {name: statistics.mean(of) for name, of in ratios.items()},
            "alarms": alarms,
            "step_ms": times}


def checks(steps: int):
    """Two processes at a time, as two workers share a machine; every other step is checked."""
    def cost(core):
        # Of this thread, and so of the process that it starts.
        os.sched_setaffinity(0, {core})
        done = pontoon("bench", "train", "--checks", "both", "--batch", 4, "--steps", steps, "--json")
        return json.loads(done)["checks_overhead"]

    cores = sorted(os.sched_getaffinity(0))[:2]
    with ThreadPoolExecutor(len(cores)) as both:
        costs = [one for _ in range(ROUNDS) for one in list(both.map(cost, cores))]
    return {"model": f"llama-30m, 4 x 256 tokens a step, {steps} steps in each of {len(costs)} processes",
            "what": "time of a checked step over that of its neighbour without checks, less 1: the "
                    "median of each process",
            "median": statistics.median(costs), "spread": statistics.pstdev(costs), "checks_overhead": costs}


def processor():
    """The processor's name where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return name.group(1) if name else platform.machine()


ROUNDS = 3


def main():
    global ROUNDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    modes = ["latency", "hundred", "goodput", "overhead", "checks", "clean", "flips"]
    parser.add_argument("what", choices=modes)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--micro-batches", type=int, default=64, help="overhead: of a step")
    parser.add_argument("--model", default="llama-30m", help="overhead: a preset, or `wide`: a layer of a large model")
    parser.add_argument("--without", action="append", default=[], metavar="KIND",
                        help="overhead: leaves a kind of run out, where memory is short")
    parser.add_argument("--flips", type=int, default=162, help="81 are each bit in each tensor")
    parser.add_argument("--sweep", type=int, default=0, metavar="N",
                        help="flips: N more within a step, from the training crate's test")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which stays")
    parser.add_argument("--note", default="two cores, shared with other work")
    arguments = parser.parse_args()
    ROUNDS = arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        if arguments.keep:
            arguments.keep.mkdir(parents=True)
            folder = arguments.keep
        folder, steps = Path(folder), arguments.steps
        result = {
            "latency": lambda: latency(folder),
            "hundred": lambda: at_random(folder, "qwen3-1m", 256, steps or 2000, 1, 3, 10),
            "goodput": lambda: at_random(folder, "llama-30m", 128, steps or 400, 1, 2, 10),
            "overhead": lambda: overhead(folder, arguments.model, arguments.micro_batches, steps or 20,
                                         arguments.without),
            "checks": lambda: checks(steps or 16),
            "clean": lambda: clean(folder, steps or 10_000),
            "flips": lambda: flips(folder, arguments.flips, arguments.sweep),
        }[arguments.what]()
    result["machine"] = {"processor": processor(), "cores": os.cpu_count(), "note": arguments.note}
    result["date"] = time.strftime("%Y-%m-%d")
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    shown = {key: value for key, value in result.items() if key not in ("summary", "step_ms", "alarms_told")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
