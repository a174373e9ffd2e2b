"""Merging: many LoRAs into one, or into the base. Importing this package registers the rules; a new rule is one more
name here."""

from molex.merging import (  # noqa: F401 (registers the rules)
    cat,
    dare,
    dare_ties,
    iso_c,
    knots,
    lego,
    linear,
    magnitude,
    svd,
    ties,
)
from molex.merging.adapters import merge
from molex.merging.base import MergeRule, make_rule, rules
from molex.merging.merged import LayerReport, Merged, merge_factors
from molex.merging.reversible import Reversible, compress

__all__ = [
    "LayerReport",
    "MergeRule",
    "Merged",
    "Reversible",
    "compress",
    "make_rule",
    "merge",
    "merge_factors",
    "rules",
]
