"""`python -m experiments NAME`: runs one experiment; `--help` lists names and settings."""

import io
import sys

import tyro

from experiments.benchmarks.flow import main as benchmark_flow
from experiments.benchmarks.gate import main as benchmark_gate
from experiments.benchmarks.ntk import main as benchmark_ntk
from experiments.benchmarks.realized import main as benchmark_realized
from experiments.gate import main as gate
from experiments.quickstart import main as quickstart
from experiments.realized import main as realized

EXPERIMENTS = {
    "quickstart": quickstart,
    "realized": realized,
    "gate": gate,
    "benchmark-flow": benchmark_flow,
    "benchmark-gate": benchmark_gate,
    "benchmark-ntk": benchmark_ntk,
    "benchmark-realized": benchmark_realized,
}


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log in ASCII or a Windows code page has no Greek letters
        sys.stdout.reconfigure(errors="replace")
    tyro.extras.subcommand_cli_from_dict(EXPERIMENTS)


if __name__ == "__main__":
    main()
