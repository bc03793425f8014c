"""Tasks that ask for an answer about pictures: one file each, and what runs them."""

from __future__ import annotations

from imglish.evaluation.tasks import classification, entailment, nlvr2, vqa
from imglish.evaluation.tasks.base import Task, TaskScores

TASKS: dict[str, Task] = {task.name: task for task in (vqa.TASK, nlvr2.TASK, entailment.TASK, classification.TASK)}

__all__ = ["TASKS", "Task", "TaskScores"]
