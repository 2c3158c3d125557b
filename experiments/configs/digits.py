"""Handwritten digits: EfficientNet-Lite0, pretrained on photographs, tuned in seven ways on 250, 1,000 and 4,000 images.

python experiments/finetune_image.py --config=experiments/configs/digits.py
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration; each value can be set on the command line, as `--config.seeds=0`."""
    c = ml_collections.ConfigDict()
    c.strategies = ("probe", "last", "few", "lora", "adapters", "whole", "scratch")  # or "gradual"
    c.rows = (250, 1000, 4000)  # training images
    c.seeds = (0, 1, 2)  # of which images, their order, how they are drawn anew, and what begins at random

    c.model = "efficientnet"  # or "squeezenet"
    c.data = "digits"  # or a folder with one of images per class, or a name that tensorflow-datasets knows
    c.image, c.label = "image", "label"  # the columns of a data set of tensorflow-datasets
    c.size = 32  # pixels
    c.augment = ml_collections.ConfigDict({"shift": 2, "contrast": 0.2, "turn": 0.0, "flip": False})

    c.few = 3  # how many layers are the last few: the last two convolutions and the classifier
    c.lora = ml_collections.ConfigDict({"rank": 8, "alpha": 16.0, "targets": ".*/(expand|project|head)/conv"})
    c.adapter = ml_collections.ConfigDict({"bottleneck": 8, "targets": ".*/project/conv"})
    c.stages = (1, 3)  # of "gradual": how many layers train, before all do
    # The highest learning rates: the best on the validation images of those about three times apart, 1,000 training
    # images, seed 9; of "lora" 3e-3 and 1e-2 are alike, of "gradual" one was tried.
    c.rate = ml_collections.ConfigDict()
    c.rate.last, c.rate.few, c.rate.lora, c.rate.adapters = 1e-1, 3e-3, 1e-2, 1e-2
    c.rate.whole, c.rate.scratch, c.rate.gradual = 3e-3, 3e-3, 3e-3
    c.layerwise = 1.0  # below 1, each layer is trained that much slower than the one behind it
    c.warmup = 0.1  # the share of all steps in which the learning rate rises; then it falls to 0
    c.decay = 0.01  # of the weights that train
    c.clip = 1.0  # the norm of the gradient
    c.momentum = 0.9  # how much of its statistics a norm that trains keeps at each step

    c.batch = 32
    c.steps = 120  # of every run, however many images: time is no advantage
    c.checks = 3  # how often the validation images are looked at; the best of these states is kept
    c.measured = 500  # training images at most on which the accuracy is measured at the end

    c.out = "runs"  # holds the file of results, images-digits.jsonl, and the plot
    return c
