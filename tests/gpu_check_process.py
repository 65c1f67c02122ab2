"""A process of a step that finds what it is told to, and ends as it is told to: no card, no torch."""

import argparse
import json
import os
import signal
import sys
import time
from typing import Any


def outcome(what: str, *, right: bool = True, error: float | None = 1.0) -> dict[str, Any]:
    numbers = {"error": error, "eager_error": 0.8, "allowed": 1.6, "used": 0.6}
    return {"outcome": {"case": "a kernel", "what": what, "right": right, **numbers}}


def row(suite: str, name: str, **more: Any) -> dict[str, Any]:
    found = {
        "suite": suite,
        "name": name,
        "m": 8,
        "k": 16,
        "n": 16,
        "rank": 4,
        "dtype": "bf16",
        "dropout": 0.0,
    }
    times = {"median_ms": {"frozen": 1.0, "reference": 2.0, "fastlora": 1.5}, "spread_ms": {}}
    counted: dict[str, Any] = {"kept_bytes": {}, "peak_bytes": {}}
    found |= {"dtype": "bf16", "dropout": 0.0}
    both: dict[str, Any] = {
        "threads": None,
        "pass": "forward_backward",
        "flops": 10,
        "least_bytes": 10,
        "left_out": {},
    }
    return {"row": found | times | counted | both | more}


PREFLIGHT = {
    "preflight": {
        "device": "Some Card 9000",
        "environment": {
            "torch": "2.11",
            "triton": "3.6",
            "fastlora": "1",
            "date": "2026-01-01",
            "beside": "-",
        },
        "processes": 2,
    }
}
PREDICTED = {"predicted_ms": {"frozen": 0.9, "fastlora": 1.2}, "host_ms": {"fastlora": 0.1}}
PROFILE = {"profile": {"case": "a layer", "kernel_us": {"lora_forward": 900.0}}}
# by step, the items in their order: a name, then what is found or done; some steps only for one test
SCENARIO: dict[str, list[tuple[str, list[Any]]]] = {
    "preflight": [("preflight", [PREFLIGHT])],
    # every second one is the first process's: it crashes in its second item, the third is not lost
    "exactness": [
        ("first", [outcome("first")]),
        ("other", [outcome("other")]),
        ("crashing", [outcome("before the crash"), "crash"]),
        ("wrong", [outcome("a tile", right=False, error=None)]),
        ("after it", [outcome("after it")]),
    ],
    "layers": [
        ("fast", [row("eager", "a layer", **PREDICTED), row("graphs", "a layer", **PREDICTED), PROFILE]),
        ("slow", ["hang"]),
        ("behind it", [row("eager", "never measured")]),
    ],
    "training": [("model", [row("steps", "a model", m=None, k=None, n=None, **{"pass": "step"})])],
    "idle": [],
    "leaving": [("first", [outcome("first")]), ("left", ["leave"]), ("after it", [outcome("after it")])],
    "told": [("cache", ["cache"])],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step")
    for name in ("output", "seconds"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("share", "of", "skip"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    with open(given.output, "a") as file:
        mine = SCENARIO[given.step][given.share :: given.of][given.skip :]
        file.write(json.dumps({"items": [name for name, _ in mine]}) + "\n")
        for name, found in mine:
            for each in [{"begin": name}, *found]:
                if each == "leave":
                    os._exit(0)
                elif each == "crash":
                    print("an illegal address, say", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGSEGV)
                elif each == "cache":
                    cache = os.environ["FASTLORA_CACHE"]
                    file.write(json.dumps(outcome(cache, right=not os.path.exists(cache))) + "\n")
                elif each == "hang":
                    time.sleep(600)
                else:
                    file.write(json.dumps(each) + "\n")
                    file.flush()
        file.write(json.dumps({"end": given.step}) + "\n")


if __name__ == "__main__":
    main()
