"""Simulates 512 workers over 54 days at the failure rates of the Llama 3 report.

    python benches/simulate_published.py target/release/pontoon benches/results/DATE-simulation.json

Writes one JSON file: the settings and results of `pontoon simulate`, for the report's rate per
device and for all of its 419 interruptions, several seeds each, and the time it took.
"""

import json
import os
import platform
import subprocess
import sys
import time

WORKERS, DAYS, SEEDS = 512, 54, 3


def simulate(program, rate, seed):
    command = [program, "simulate", "--workers", str(WORKERS), "--days", str(DAYS)]
    command += ["--rate", rate, "--seed", str(seed), "--json"]
    begun = time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    run = json.loads(output)
    run["took_s"] = round(time.monotonic() - begun, 1)
    goodput = 100 * run["result"]["goodput"]
    faults = run["result"]["faults"]
    print(f"{rate} seed {seed}: goodput {goodput:.3f}%, {faults} faults, {run['took_s']} s")
    return run


def main():
    program, path = sys.argv[1:]
    runs = {
        rate: [simulate(program, rate, seed) for seed in range(1, SEEDS + 1)]
        for rate in ["per-device", "published"]
    }
    machine = {"system": platform.platform(), "cores": os.cpu_count()}
    with open(path, "w") as file:
        json.dump({"machine": machine, "runs": runs}, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
