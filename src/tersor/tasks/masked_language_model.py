"""Masked language modelling, for models whose every output sees all of the tokens: some are replaced, and asked for."""

from __future__ import annotations

from tersor.tasks.language_model import load_data
from tersor.tasks.task import Task
from tersor.train.objectives import masked_language_modelling

TASK = Task(masked_language_modelling, load_data)
