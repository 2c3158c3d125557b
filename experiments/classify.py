"""Classifies texts with a fine-tuned adapter.

python experiments/classify.py --adapter=runs/reviews-lora-seed0 "a gorgeous, witty film"
"""

import sys
from pathlib import Path
from typing import Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import app, flags

import peftjax as pj
from experiments import classifier
from experiments.batches import batches
from experiments.train import predict

FOLDER = flags.DEFINE_string("adapter", None, "the folder of a run, as finetune.py leaves in runs/")


def classify(folder: str | Path, texts: Sequence[str]) -> list[tuple[str, float]]:
    """The most probable class of each text, and its probability.

    Args:
      folder: of a run; the adapter is laid on the model that it was trained on.
      texts: none of them empty.

    Raises:
      ValueError: no text or an empty one, or a folder without an adapter that fits.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("expected at least one text, and none that is empty")
    page = classifier.read(folder)
    model = classifier.Classifier(page)
    tuned = pj.load(Path(folder) / classifier.ADAPTER, model.params)
    ids = model.tokens(texts)
    read = batches(ids, np.zeros(len(texts), np.int32), min(32, len(texts)), model.widths)
    chances = np.asarray(jax.nn.softmax(predict(pj.wrap(model))(tuned, read, len(texts))))
    return [(page.names[k], float(chances[row, k])) for row, k in enumerate(chances.argmax(1))]


def main(argv: list[str]) -> None:
    """Prints a line per text."""
    if FOLDER.value is None or len(argv) < 2:
        raise app.UsageError('expected --adapter=FOLDER "text" ["text" ...]')
    try:
        found = classify(FOLDER.value, argv[1:])
    except ValueError as error:
        sys.exit(str(error))
    for text, (name, chance) in zip(argv[1:], found):
        print(f"{name}  {chance:.3f}  {text}")


if __name__ == "__main__":
    app.run(main)
