"""Questions and answers that a package ships, and a part of them that no training sees."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlora._core.extras import package_folder, require
from fastlora.transfer.models.smollm2 import INSTALL

NAME = "ChatterBot's English dialogues (chatterbot-corpus)"
LICENCE = "BSD"
# left out: code (long, and its brackets are lost), and what a demo should not say: gossip, humor, politics
TOPICS = (
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "emotion",
    "food",
    "greetings",
    "health",
    "history",
    "literature",
    "money",
    "movies",
    "psychology",
    "science",
    "sports",
    "tech_support",
    "trivia",
)


@dataclass(frozen=True)
class Dialogue:
    """A question and its answer.

    Attributes:
        question: What the user says.
        answer: What the model should say.
    """

    question: str
    answer: str


def corpus_folder() -> Path:
    """Where the package keeps its English dialogues.

    Raises:
        ImportError: It is not installed.
    """
    package = package_folder(
        "chatterbot_corpus", distribution="chatterbot-corpus", purpose="the demo", command=INSTALL
    )
    return package / "data" / "english"


def load_dialogues(folder: Path) -> list[Dialogue]:
    """The first question of every conversation and its answer, each pair once, in the order of the files.

    Args:
        folder: A YAML file for each of :data:`TOPICS`.

    Raises:
        ImportError: PyYAML is not installed.
    """
    yaml = require("yaml", distribution="pyyaml", purpose="the demo", command=INSTALL)
    found: dict[Dialogue, None] = {}
    for topic in TOPICS:
        text = (folder / f"{topic}.yml").read_text(encoding="utf-8")
        for said in yaml.safe_load(text)["conversations"]:
            # an entry of one file is a line alone
            if isinstance(said, list):
                found[Dialogue(*(str(line).strip() for line in said[:2]))] = None
    return list(found)


def split_dialogues(
    dialogues: Sequence[Dialogue], *, test: int, seed: int
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and test dialogues, shuffled, that share no question and no answer.

    What is the same but for case and punctuation is on one side, and what is linked through others as well.

    Args:
        dialogues: All of them.
        test: How many to hold out; one group of linked ones may bring a few more.
        seed: Seed of the order.

    Example:
        >>> pairs = [("What is H2O?", "Water."), ("what is h2o", "A liquid."), ("Hi", "Hello")]
        >>> parts = split_dialogues([Dialogue(*pair) for pair in pairs], test=1, seed=0)
        >>> [len(part) for part in parts]
        [2, 1]
    """
    groups = _linked(dialogues)
    order = random.Random(seed)
    order.shuffle(groups)
    # most questions stand alone; a large group would be most of a small test
    groups.sort(key=lambda group: len(group) > 1)
    held_out: list[Dialogue] = []
    while groups and len(held_out) < test:
        held_out += groups.pop(0)
    train = [dialogue for group in groups for dialogue in group]
    order.shuffle(train)
    return train, held_out


def _linked(dialogues: Sequence[Dialogue]) -> list[list[Dialogue]]:
    """Groups of dialogues, no two of which share a question or an answer."""
    groups: list[tuple[set[str], list[Dialogue]]] = []
    for dialogue in dialogues:
        words = {f"question {_plain(dialogue.question)}", f"answer {_plain(dialogue.answer)}"}
        together, apart = [dialogue], []
        for known, members in groups:
            if known & words:
                words, together = words | known, members + together
            else:
                apart.append((known, members))
        groups = [*apart, (words, together)]
    return [members for _, members in groups]


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()
