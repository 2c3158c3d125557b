"""Methods side by side on movie reviews, by what trains, by time and by the number of training sentences; three seeds.

    python experiments/compare.py --config=experiments/configs/compare.py

Learning rates and sizes are the winners of `sweep.py`, chosen on validation: on the reviews, those in
experiments/results/reviews-winners.json; with --quick, which took 7:41 on two cores with nothing compiled before, those of
this page.

Test accuracy on 250, 1,000 and 3,000 training sentences, the mean over seeds 0, 1 and 2 (least-most):

    words    0.634 (0.627-0.638)  0.720 (0.706-0.730)  0.790 (0.790-0.790)
    probe    0.748 (0.740-0.755)  0.788 (0.786-0.788)  0.802 (0.802-0.802)
    lora     0.817 (0.810-0.829)  0.842 (0.833-0.850)  0.867 (0.860-0.876)
    dora     0.817 (0.814-0.822)  0.838 (0.831-0.851)  0.868 (0.863-0.875)
    adapter  0.784 (0.772-0.796)  0.829 (0.829-0.830)  0.855 (0.852-0.857)
    ia3      0.789 (0.780-0.794)  0.828 (0.826-0.832)  0.856 (0.855-0.858)
    bitfit   0.795 (0.770-0.807)  0.823 (0.819-0.830)  0.843 (0.831-0.850)
    prefix   0.758 (0.749-0.765)  0.808 (0.799-0.818)  0.844 (0.842-0.848)
    prompt   0.763 (0.755-0.769)  0.799 (0.794-0.802)  0.825 (0.822-0.827)
    full     0.796 (0.785-0.804)  0.841 (0.834-0.857)  0.858 (0.852-0.866)
    scratch  0.601 (0.578-0.625)  0.612 (0.496-0.672)  0.584 (0.496-0.760)

The 99 runs are in experiments/results/reviews-compare.jsonl; two processes of one core each took two hours and a half, one
for LoRA, DoRA, full fine-tuning, scratch and the baselines, one for the rest.
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
