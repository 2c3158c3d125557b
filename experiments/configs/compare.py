"""Methods side by side on movie reviews, by what trains, by time and by the number of training sentences; three seeds.

    python experiments/compare.py --config=experiments/configs/compare.py

Learning rates and sizes are the winners of `sweep.py`, chosen on validation: on the reviews, those in
experiments/results/reviews-winners.json; with --quick, those of this page.
"""

from pathlib import Path

import ml_collections

from experiments.configs import reviews

WINNERS = Path(__file__).parents[1] / "results" / "reviews-winners.json"


def get_config() -> ml_collections.ConfigDict:
    """The configuration; each value can be set on the command line, as `--config.methods=lora,prefix`."""
    c = reviews.get_config()
    c.methods = ("lora", "dora", "adapter", "ia3", "bitfit", "prefix", "prompt", "full", "scratch")
    c.baselines = ("words", "probe")  # TF-IDF, and the frozen encoder, under logistic regression
    c.rows = (250, 1000, 3000)  # training sentences
    c.passes = (6, 3, 2)  # over each of these; the best is kept
    c.seeds = (0, 1, 2)  # of which sentences, their order, dropout, and what begins at random
    c.winners = str(WINNERS)  # or those of another sweep, on these data; "" takes the rates and sizes of this page
    return c
