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
from molex.merging.compare import compare_merges
from molex.merging.merged import LayerReport, Merged, merge_factors
from molex.merging.of_mixture import merge_experts, merge_mixture, offered
from molex.merging.reversible import Reversible, compress
from molex.merging.soups import learn_soup
from molex.merging.usage import usage_weights

__all__ = [
    "LayerReport",
    "MergeRule",
    "Merged",
    "Reversible",
    "compare_merges",
    "compress",
    "learn_soup",
    "make_rule",
    "merge",
    "merge_experts",
    "merge_factors",
    "merge_mixture",
    "offered",
    "rules",
    "usage_weights",
]
