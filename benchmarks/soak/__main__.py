"""python -m benchmarks.soak [--seconds 600] [--seed 0] [--clients 12]        (make soak)

Exits with 1 where anything was wrong, and says what; a wrong answer ends it at once.
"""

import argparse
import sys

from benchmarks.soak.run import Plan, SoakFailed, run


def main() -> None:
    parser = argparse.ArgumentParser(description="Random traffic against a server, every answer checked")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=12)
    arguments = parser.parse_args()
    try:
        summary = run(Plan(seconds=arguments.seconds, seed=arguments.seed, clients=arguments.clients))
    except SoakFailed as error:
        sys.exit(f"wrong:\n{error}")
    print(f"nothing wrong in {arguments.seconds:.0f} s with seed {arguments.seed}")
    for name, number in summary.items():
        print(f"{name:>24}  {number:,.10g}")


if __name__ == "__main__":
    main()
