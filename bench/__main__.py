"""Four commands that measure or calculate what a run costs.

python -m bench configs/tiny.yaml [key=value ...]                         time one step, on random weights
torchrun --nproc_per_node=8 -m bench configs/smollm3.yaml [key=value ...]
python -m bench plan configs/smollm3.yaml gpus=8 gpu=h100                 what a run needs, calculated; gpu=cpu: here
python -m bench check [configs/smollm3.yaml] [key=value ...]              the first minutes on a new host
python -m bench trl [configs/tiny.yaml] [key=value ...]                   the same step through TRL

Words beside the config's keys: the dataclasses of bench/plan.py, bench/step.py and bench/trl.py.
"""

import sys

from bench.plan import print_plan
from bench.step import print_checks, time_config
from bench.trl import compare_trainers
from config import command


def main(words: list[str]) -> None:
    """Runs one command. Raises ConfigError for a bad word."""
    run = {"plan": print_plan, "check": print_checks, "trl": compare_trainers}.get(words[0])
    run(words[1:]) if run else time_config(words)


if __name__ == "__main__":
    with command(__doc__):
        main(sys.argv[1:])
