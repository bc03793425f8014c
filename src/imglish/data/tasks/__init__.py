"""Data of tasks that ask for an answer: questions, statements and hypotheses about one or several pictures, classes of
them."""

from __future__ import annotations

from imglish.data.tasks import classification, entailment, nlvr2, vqa
from imglish.data.tasks.examples import Example, TaskData, hold_out, read_examples

READERS = {"vqa": vqa.read, "nlvr2": nlvr2.read, "entailment": entailment.read, "classification": classification.read}

__all__ = ["READERS", "Example", "TaskData", "hold_out", "read_examples"]
