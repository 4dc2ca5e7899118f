"""Masked language modelling, for models whose outputs all see every token: some are replaced, the model names them."""

from __future__ import annotations

from tersor.tasks.language_model import KEPT, load_data
from tersor.tasks.task import Task
from tersor.train.objectives import masked_language_modelling

TASK = Task(masked_language_modelling, load_data, kept=KEPT)
