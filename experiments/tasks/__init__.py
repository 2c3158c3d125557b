"""What a model of texts is tuned for: each task reads its rows, makes labels and a loss of them, and scores outputs."""

from experiments.tasks.classify import Classify
from experiments.tasks.regress import Regress
from experiments.tasks.span import Span
from experiments.tasks.tag import Tag
from experiments.tasks.task import Encoded, Result, Task

TASKS: dict[str, type[Task]] = {"classify": Classify, "regress": Regress, "tokens": Tag, "span": Span}

__all__ = ["TASKS", "Classify", "Encoded", "Regress", "Result", "Span", "Tag", "Task"]
