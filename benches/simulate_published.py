"""Simulates 512 workers over 54 days at the failure rates of the Llama 3 report.

    python benches/simulate_published.py target/release/pontoon benches/results/DATE-simulation.json

Writes one JSON file: the settings and results of `pontoon simulate`, for the report's rate per
device and for all of its 419 interruptions, several seeds each, without audits and with 1%, by how
much these make a step longer, what the account charges for them, and the time it took.
"""

import json
import os
import platform
import subprocess
import sys
import time

WORKERS, DAYS, SEEDS, AUDIT = 512, 54, 3, 0.01


def simulate(program, rate, seed, audit):
    command = [program, "simulate", "--workers", str(WORKERS), "--days", str(DAYS)]
    command += ["--rate", rate, "--seed", str(seed), "--audit", str(audit), "--json"]
    begun = time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    run = json.loads(output)
    run["took_s"] = round(time.monotonic() - begun, 1)
    goodput = 100 * run["result"]["goodput"]
    faults = run["result"]["faults"]
    print(f"{rate} seed {seed} audit {audit}: goodput {goodput:.3f}%, {faults} faults, {run['took_s']} s")
    return run


def beside(run, without):
    """Adds what audits cost: the same faults, the same time, fewer steps."""
    of = run["result"]
    ratio = without["result"]["steps"] / of["steps"] * of["days"] / without["result"]["days"]
    run["step_longer"] = ratio - 1
    run["audit_charged"] = of["lost_s"]["audit"] / (of["days"] * 86_400)
    longer, charged = 100 * run["step_longer"], 100 * run["audit_charged"]
    print(f"  a step is {longer:.2f}% longer, {charged:.2f}% charged")
    return run


def main():
    program, path = sys.argv[1:]
    runs, audited = {}, {}
    for rate in ["per-device", "published"]:
        seeds = range(1, SEEDS + 1)
        runs[rate] = [simulate(program, rate, seed, 0) for seed in seeds]
        audited[rate] = [
            beside(simulate(program, rate, seed, AUDIT), run)
            for seed, run in zip(seeds, runs[rate])
        ]
    machine = {"system": platform.platform(), "cores": os.cpu_count()}
    with open(path, "w") as file:
        json.dump({"machine": machine, "runs": runs, "with_audits": audited}, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
