"""What a fine-tuned adapter says of texts.

python experiments/predict.py --adapter=runs/reviews-lora-seed0 "a gorgeous, witty film"
python experiments/predict.py --adapter=runs/questions-span-lora-seed0 "Who wrote it?" "It was written by Ada."
"""

import sys
from pathlib import Path
from typing import Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags

import peftjax as pj
from experiments import assets, text_model
from experiments.batches import batches
from experiments.train import predict

FOLDER = flags.DEFINE_string("adapter", None, "the folder of a run, as finetune.py leaves in runs/")


def said(folder: str | Path, texts: Sequence[str]) -> list[str]:
    """What the model says of each text: a class and its probability, a number, tags; or of each question, an answer.

    Args:
      folder: of a run; the adapter is laid on the model that it was trained on.
      texts: none of them empty; of the task "span", questions and contexts in turn.

    Raises:
      ValueError: no text or an empty one, a question without a context, or a folder without an adapter that fits.
    """
    page = text_model.read(folder)
    task, model = page.task, text_model.TextModel(page)
    encoded = task.read_texts(model.tokens, task.parsed(texts))
    tuned, n = pj.load(Path(folder) / text_model.ADAPTER, model.params), len(encoded.ids)
    read = batches(encoded.ids, encoded.inputs, min(32, n), model.widths)
    outputs = predict(model.apply, longest=model.widths[-1] if task.per_token else None)(tuned, read, n)
    return [task.said(answer, out) for answer, out in zip(task.answers(outputs, encoded), outputs)]


def main(argv: list[str]) -> None:
    """Prints a line per text."""
    if FOLDER.value is None or len(argv) < 2:
        raise app.UsageError('expected --adapter=FOLDER "text" ["text" ...]')
    try:
        found = said(FOLDER.value, argv[1:])
    except (ValueError, FloatingPointError, assets.Missing) as error:
        sys.exit(str(error))
    for text, answer in zip(argv[1 :: len(argv[1:]) // len(found)], found):  # of a question and its context, the first
        print(f"{answer}  {text}")


if __name__ == "__main__":
    app.run(main)
