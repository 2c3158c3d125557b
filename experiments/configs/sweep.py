"""Learning rate and size of each method, chosen on 1,000 validation sentences after training on 1,000 others.

    python experiments/sweep.py --config=experiments/configs/sweep.py

A page of its own for what is tried; the model, the data and all else are those of `reviews.py`. The winners, their
validation accuracy (its deviation over seeds 0 and 1), and the least mean of all that was tried:

    method   rate   size  best            least
    lora     0.003  16    0.838 (0.006)   0.782
    dora     0.003  16    0.835 (0.004)   0.783
    adapter  0.01   16    0.824 (0.010)   0.706
    ia3      0.03   -     0.830 (0.000)   0.802
    bitfit   0.01   -     0.823 (0.013)   0.792
    prefix   0.1    8     0.821 (0.009)   0.782
    prompt   0.01   32    0.809 (0.000)   0.778
    full     0.0003 -     0.841 (0.002)   0.821
    scratch  0.0003 -     0.575 (0.090)   0.511

The 92 runs are in experiments/results/reviews-sweep.jsonl: two and a half hours of two cores, shared with other work.
Eleven rows more try the next rates above: LoRA at 0.01 and BitFit at 0.03 end at chance (0.511), IA3 at 0.1 has 0.821,
DoRA of rank 4 at 0.01 0.598, full fine-tuning at 0.001 0.711 (seed 0 alone). The best rates of adapters and prefixes are
the highest that were tried, but what the last step brought is less than the deviation over seeds.
"""

import ml_collections

from experiments.configs import reviews


def get_config() -> ml_collections.ConfigDict:
    """The configuration; each value can be set on the command line, as `--config.methods=lora,prefix`."""
    c = reviews.get_config()
    c.methods = ("lora", "dora", "adapter", "ia3", "bitfit", "prefix", "prompt", "full", "scratch")
    c.rows, c.epochs, c.patience = 1000, 2, 2
    c.seeds = (0, 1)  # of the rows that are trained on, their order, and what begins at random
    c.tries = 0  # so many settings of each method, drawn at random; 0 for all
    c.rates = ml_collections.ConfigDict()  # what is tried: learning rates,
    c.rates.lora = c.rates.dora = (3e-4, 1e-3, 3e-3)
    c.rates.adapter = (3e-4, 1e-3, 3e-3, 1e-2)
    c.rates.bitfit = (1e-3, 3e-3, 1e-2)
    c.rates.ia3 = c.rates.prompt = (3e-3, 1e-2, 3e-2)
    c.rates.prefix = (3e-3, 1e-2, 3e-2, 1e-1)
    c.rates.full = (5e-5, 1e-4, 3e-4)
    c.rates.scratch = (1e-4, 3e-4, 1e-3)
    c.rates.adalora = c.rates.loha = c.rates.lokr = c.rates.oft = (3e-4, 1e-3, 3e-3)  # if c.methods names them
    c.rates.compacter = c.rates.reft = c.rates.layer_norm = (1e-3, 3e-3, 1e-2)
    c.rates.vera = c.rates.p_tuning = c.rates.head = (3e-3, 1e-2, 3e-2)
    c.sizes = ml_collections.ConfigDict()  # and ranks, bottlenecks and lengths; () is that of the method's block
    c.sizes.lora = c.sizes.dora = (4, 16)
    c.sizes.adapter = (16, 64)
    c.sizes.prefix = c.sizes.prompt = (8, 32)
    c.sizes.adalora = c.sizes.vera = c.sizes.loha = c.sizes.lokr = c.sizes.oft = ()
    c.sizes.compacter = c.sizes.reft = c.sizes.p_tuning = ()
    return c
