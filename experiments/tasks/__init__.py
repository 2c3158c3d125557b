"""What a model of texts is tuned for: each task reads its rows, makes labels and a loss of them, and scores outputs."""

import ml_collections

from experiments.data import Dataset, Rows
from experiments.tasks.classify import Classify
from experiments.tasks.regress import Regress
from experiments.tasks.span import Span
from experiments.tasks.tag import Tag
from experiments.tasks.task import Encoded, Result, Task

TASKS: dict[str, type[Task]] = {"classify": Classify, "regress": Regress, "tokens": Tag, "span": Span}


def read(c: ml_collections.ConfigDict) -> tuple[Task, Dataset[Rows]]:
    """The task and the rows that a page names.

    Raises:
      ValueError: a task that is not known, an option that only other tasks read, or rows that are not of this one.
    """
    if c.task not in TASKS:
        raise ValueError(f"task {c.task!r}; expected one of {', '.join(TASKS)}")
    own = TASKS[c.task].options
    for name in (name for other in TASKS.values() for name in other.options):
        if name not in own and c[name] and c[name] != name:  # a column that nobody named is called as its option
            raise ValueError(f"--config.{name}={c[name]}: task {c.task!r} reads only {', '.join(own)}")
    return TASKS[c.task].read(c)


__all__ = ["TASKS", "Classify", "Encoded", "Regress", "Result", "Span", "Tag", "Task", "read"]
