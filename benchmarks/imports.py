"""Start-up: `import exitsafe` and `exitsafe --help`, beside a bare interpreter in the same run."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.timing import best_seconds


def main() -> None:
    commands = {
        "python -c pass": ["-c", "pass"],
        "import exitsafe": ["-c", "import exitsafe"],
        "exitsafe --help": ["-m", "exitsafe", "--help"],
    }
    alternatives = {
        name: lambda arguments=arguments: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        for name, arguments in commands.items()
    }
    seconds = best_seconds(alternatives, rounds=5)
    print("(start-up; goals: import 0.3 s, --help 1 s)")
    for name, value in seconds.items():
        print(f"    {name}: {value:.2f} s, {value / seconds['python -c pass']:.1f} times a bare interpreter")


if __name__ == "__main__":
    main()
