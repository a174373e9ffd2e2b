"""The embedded bench: a tiny pretrained base, skills it does not know, exact scores, no network."""

from molex.workbench.data import FORMATS, collate, dataset, numbered, question_and_answer
from molex.workbench.model import load_base
from molex.workbench.scoring import answers, exact_match, exact_match_by_skill
from molex.workbench.skill import Skill, split_of
from molex.workbench.skills import skills
from molex.workbench.tokenizer import load_tokenizer
from molex.workbench.transformations import transformations

__all__ = [
    "FORMATS",
    "Skill",
    "answers",
    "collate",
    "dataset",
    "exact_match",
    "exact_match_by_skill",
    "load_base",
    "load_tokenizer",
    "numbered",
    "question_and_answer",
    "skills",
    "split_of",
    "transformations",
]
