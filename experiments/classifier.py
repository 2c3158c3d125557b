"""A classifier of texts on a pretrained BERT: what the scripts share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.assets import MINILM, fetch
from experiments.batches import Batch, Tokens, lengths
from experiments.models import bert
from experiments.models.load import folder_of, load

PAGE, ADAPTER = "classifier.json", "adapter"


@dataclasses.dataclass(frozen=True)
class Page:
    """What has to be known, beside an adapter, to classify a text.

    Attributes:
      model: "minilm", a folder, or an id on the Hugging Face hub.
      pool: as `bert.Bert` has it.
      length: the most tokens of a text.
      fixed: whether every batch has that length.
      names: of the classes, in order.
    """

    model: str
    pool: str
    length: int
    fixed: bool
    names: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Writes it into the folder of a run."""
        here = str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model
        (folder / PAGE).write_text(json.dumps({**dataclasses.asdict(self), "model": here}, indent=1) + "\n")


def read(folder: str | Path) -> Page:
    """The page in the folder of a run.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = Path(folder) / PAGE
    if not path.is_file():
        raise ValueError(f"{folder} has no {PAGE}; expected the folder of a run, as finetune.py leaves in runs/")
    try:
        page = json.loads(path.read_text())
        return Page(**{**page, "names": tuple(page["names"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class Classifier:
    """A pretrained encoder under a head that is zero, as a function of parameters, and what turns texts to its input.

    Args:
      page: which.
      dropout: the rate in the encoder and before the head while a key is given.
    """

    def __init__(self, page: Page, dropout: float = 0.0):
        if page.pool not in bert.POOLS:
            raise ValueError(f"pool {page.pool!r}; expected one of {', '.join(bert.POOLS)}")
        folder = fetch(MINILM) if page.model == "minilm" else folder_of(page.model)
        config, encoder = load(folder, page.pool)
        if not 3 <= page.length <= config.max_position_embeddings:
            raise ValueError(f"length {page.length}; this model takes 3 to {config.max_position_embeddings} tokens")
        config = dataclasses.replace(config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        self.page, self.tokens = page, Tokens(folder, page.length)
        self.widths = lengths(page.length, page.fixed)
        self.params = {"bert": encoder, "classifier": _head(config, len(page.names))}
        self._model, self._encoder = bert.Classifier(config, len(page.names), page.pool), bert.Bert(config, page.pool)

    def __call__(self, params: Any, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Logits (B, classes); dropout is active where there is a key."""
        rngs = None if key is None else {"dropout": key}
        return jnp.asarray(
            self._model.apply({"params": params}, batch["ids"], batch["mask"], key is not None, rngs=rngs)
        )

    def features(self, params: Any, batch: Batch) -> jax.Array:
        """The encoder's features of each text, averaged over its tokens, (B, D)."""
        hidden, _ = self._encoder.apply({"params": params["bert"]}, batch["ids"], batch["mask"])
        return bert.mean(hidden, jnp.asarray(batch["mask"]))


def _head(config: bert.Config, classes: int) -> dict[str, jax.Array]:
    return {"kernel": jnp.zeros((config.hidden_size, classes)), "bias": jnp.zeros(classes)}
