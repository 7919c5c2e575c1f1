"""All benchmarks, one after the other: `make bench`, or `python -m benchmarks encoder` for one."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("imports", "encoder", "audit_speed", "packing_flops", "lppo_step", "report_page")


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
