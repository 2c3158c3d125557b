"""A pretrained BERT under a fresh head: what the scripts of texts share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj
from experiments import record
from experiments.assets import MINILM, fetch
from experiments.batches import Batch, lengths
from experiments.models import bert
from experiments.models.load import KNOWN, folder_of, is_folder, load
from experiments.tasks import TASKS, Task
from experiments.tokens import Tokens

PAGE, ADAPTER = "model.json", "adapter"


@dataclasses.dataclass(frozen=True)
class Page:
    """What has to be known, beside an adapter, to use the model.

    Attributes:
      model: "minilm", a folder, or an id on the Hugging Face hub; "./minilm" is a folder.
      pool: as `bert.Bert` has it; tasks with outputs for each token take "each".
      length: the most tokens of a text.
      fixed: whether every batch has that length.
      task: what the model is for.
    """

    model: str
    pool: str
    length: int
    fixed: bool
    task: Task

    def write(self, folder: Path) -> None:
        """Writes it into the folder of a run."""
        here = str(Path(self.model).resolve()) if is_folder(self.model) else self.model
        kind = next(name for name, made in TASKS.items() if made is type(self.task))
        task: Any = self.task  # a dataclass, as all tasks are
        page = {**dataclasses.asdict(self), "model": here, "task": {"kind": kind, **dataclasses.asdict(task)}}
        record.replace(folder / PAGE, json.dumps(page, indent=1) + "\n")


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
        given = {k: tuple(x) if isinstance(x, list) else x for k, x in page["task"].items() if k != "kind"}
        return Page(**{**page, "task": TASKS[page["task"]["kind"]](**given)})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


class TextModel:
    """A pretrained encoder under a head that is zero, as a function of parameters, and what turns texts to its input.

    Args:
      page: which.
      dropout: the rate in the encoder and before the head while a key is given.
    """

    def __init__(self, page: Page, dropout: float = 0.0):
        pools = ("each",) if page.task.per_token else ("mean", "first")
        if page.pool not in pools:
            raise ValueError(f"pool {page.pool!r}; expected {' or '.join(pools)}")
        folder = fetch(MINILM) if page.model == KNOWN else folder_of(page.model)
        config, encoder = load(folder, page.pool)
        if not 3 <= page.length <= config.max_position_embeddings:
            raise ValueError(f"length {page.length}; this model takes 3 to {config.max_position_embeddings} tokens")
        config = dataclasses.replace(config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        self.page, self.tokens = page, Tokens(folder, page.length)
        self.widths = lengths(page.length, page.fixed)
        outputs = page.task.outputs
        head = {"kernel": jnp.zeros((config.hidden_size, outputs)), "bias": jnp.zeros(outputs)}
        self.params = {"bert": encoder, "classifier": head}
        self._model, self._encoder = bert.Classifier(config, outputs, page.pool), bert.Bert(config, "mean")

    def fresh(self, key: jax.Array) -> Any:
        """The parameters before any training."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return jax.jit(self._model.init)(key, ids, ids)["params"]

    def __call__(self, params: Any, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Outputs (B, outputs), or (B, T, outputs) of tasks per token; dropout is active where there is a key."""
        return self._run(params, **_inputs(batch), key=key)

    def apply(self, tuned: Any, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """As the model itself, of a tuned tree: its virtual tokens, if there are any, are put in and taken out again."""
        run = pj.wrap_tokens(self._run, ids="ids", mask="mask", types="segments", pool_mask="pool_mask")
        return run(tuned, **_inputs(batch), key=key)

    def _run(self, params: Any, ids: Any, mask: Any, segments: Any, pool_mask: Any, key: Any) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        given = {"train": key is not None, "pool_mask": pool_mask}
        return jnp.asarray(self._model.apply({"params": params}, ids, mask, segments, **given, rngs=rngs))

    def features(self, params: Any, batch: Batch) -> jax.Array:
        """The encoder's features of each text, averaged over its tokens, (B, D)."""
        encoder = {name: x for name, x in params["bert"].items() if name != "pooler"}
        outputs: Any = self._encoder.apply({"params": encoder}, batch["ids"], batch["mask"])
        return outputs[1]


def _inputs(batch: Batch) -> dict[str, Any]:
    ids, mask = jnp.asarray(batch["ids"]), jnp.asarray(batch["mask"])
    return {"ids": ids, "mask": mask, "segments": batch.get("segments", jnp.zeros_like(ids)), "pool_mask": mask}
