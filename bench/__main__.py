"""Three commands that measure and calculate what a run costs.

    python -m bench configs/tiny.yaml [key=value ...]                         time one step, on random weights
    torchrun --nproc_per_node=8 -m bench configs/smollm3.yaml [key=value ...]
    python -m bench configs/tiny.yaml rollouts=64,128,256,512                 is a step linear in its rollouts?
    python -m bench plan configs/smollm3.yaml gpus=8 gpu=h100                 what a run needs, calculated
    python -m bench trl [configs/tiny.yaml] [key=value ...]                   the same step through other trainers

Each command takes the keys of the config and words of its own: bench/options.py.
"""

import os
import sys

from config import ConfigError


def main(words: list[str]) -> None:
    """Runs one command. Raises ConfigError for a bad word."""
    if words[:1] == ["plan"]:
        from bench.plan import print_plan

        print_plan(words[1:])
    elif words[:1] == ["trl"]:
        from bench.trl import compare_peers

        compare_peers(words[1:])
    else:
        from bench.step import time_config

        time_config(words)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # once, not once per rank
            print(f"config error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
