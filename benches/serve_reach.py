#!/usr/bin/env python3
"""How far serving can be pushed: malformed requests, clients that vanish, devices that are killed.

Runs the tests `fuzz` and `reach` of crates/serve at full length (they are also in the test suite,
short) and writes what they report, with the date and the machine, to benches/results/:

    python3 benches/serve_reach.py                            # about 35 minutes
    python3 benches/serve_reach.py --soak-seconds 240 --kill-seconds 15 --only soak

Devices are CPU devices of one thread each, in one process, with a random model of a million
parameters; what is measured is whether anything fails, not how fast it is.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = {
    "fuzz": ("fuzz", "malformed_requests_are_refused_in_openais_shape_and_leak_nothing"),
    "vanish": ("reach", "clients_that_vanish_mid_stream_give_every_block_back"),
    "soak": ("reach", "no_request_fails_or_is_answered_wrongly_while_devices_are_killed"),
}


def run(name, environment):
    file, test = TESTS[name]
    command = ["cargo", "test", "-q", "-p", "pontoon-serve", "--test", file, "--", "--exact", test,
               "--nocapture"]
    made = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    lines = [line for line in made.stdout.splitlines() if "report: " in line]
    reports = [json.loads(line.split("report: ", 1)[1]) for line in lines]
    for report in reports:
        print(json.dumps(report))
    if made.returncode != 0:
        print(f"{name} failed; run the test by itself for its reasons", file=sys.stderr)
    return [{**report, "passed": made.returncode == 0} for report in reports], made.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fuzz-requests", type=int, default=100_000)
    parser.add_argument("--vanishing", type=int, default=1000)
    parser.add_argument("--soak-seconds", type=int, default=1800)
    parser.add_argument("--kill-seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(TESTS), action="append")
    parser.add_argument("--name", default="serve-reach")
    options = parser.parse_args()
    environment = {
        "PONTOON_FUZZ_REQUESTS": str(options.fuzz_requests),
        "PONTOON_VANISHING": str(options.vanishing),
        "PONTOON_SOAK_SECONDS": str(options.soak_seconds),
        "PONTOON_SOAK_KILL_SECONDS": str(options.kill_seconds),
        "PONTOON_SEED": str(options.seed),
    }
    reports, worst = [], 0
    for name in options.only or TESTS:
        made, code = run(name, environment)
        reports += made
        worst = max(worst, code)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    today = datetime.date.today().isoformat()
    result = {
        "date": today,
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "kind": platform.machine()},
        "command": "python3 benches/serve_reach.py " + " ".join(sys.argv[1:]),
        "reports": reports,
    }
    path = ROOT / "benches" / "results" / f"{today}-{options.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)
    sys.exit(1 if worst else 0)


if __name__ == "__main__":
    main()
