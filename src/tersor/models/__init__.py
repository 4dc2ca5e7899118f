"""Architectures by name: `list`, `create`, `load`.

    tersor.models.list("vision/*")                      # what there is; imports no model and no torch
    tersor.models.create("shvit_s1", num_classes=10)    # a fresh model; any field of its config may be given
    tersor.models.load("shvit_s1", "shvit_s1.pth")      # the official checkpoint, in eval mode
    tersor.models.create("smt_t", features_only=True)   # a backbone: the maps of its stages
    tersor.models.config_of(model)                      # a plain dict; create(**it) builds the same model again

A model is one file in models/<family>/; docs/contributing-models.md says what it holds.
"""

from tersor.models.loading import load
from tersor.models.registry import ModelInfo, config_of, create, find, known, options_of, register
from tersor.models.registry import list_models as list

__all__ = ["ModelInfo", "config_of", "create", "find", "known", "list", "load", "options_of", "register"]
