"""Dialogues of ``fastlora demo`` in a training and a test part, and trainings that take turns."""

from functools import partial
from itertools import pairwise

import pytest

from fastlora.transfer.demo.language.dialogues import (
    Dialogue,
    corpus_folder,
    load_dialogues,
    split_dialogues,
)
from fastlora.transfer.demo.language.turns import Turns, train_in_turns


def test_trainings_take_a_step_each_in_turns() -> None:
    turns, steps = Turns(3), list[int]()

    def training(number: int) -> int:
        for _ in range(4):
            turns.take(number)
            steps.append(number)
            turns.give()
        return number

    assert train_in_turns(turns, [partial(training, number) for number in range(3)]) == [0, 1, 2]
    assert steps == [0, 1, 2] * 4


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError])
@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_training_that_fails_stops_the_others(who: int, error: type[Exception]) -> None:
    turns = Turns(3)

    def training(number: int) -> None:
        for step in range(3):
            turns.take(number)
            if (number, step) == (who, 1):
                raise error("loss is not finite")
            turns.give()

    with pytest.raises(error, match="not finite"):
        train_in_turns(turns, [partial(training, number) for number in range(3)])


def test_parts_share_no_question_and_no_answer() -> None:
    dialogues = load_dialogues(corpus_folder())
    train, test = split_dialogues(dialogues, test=60, seed=0)
    assert sorted(map(repr, [*train, *test])) == sorted(map(repr, dialogues))
    assert 60 <= len(test) < 80

    def plain(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    for field in ("question", "answer"):
        seen = [{plain(getattr(dialogue, field)) for dialogue in part} for part in (train, test)]
        assert not seen[0] & seen[1]
    assert split_dialogues(dialogues, test=60, seed=0) == (train, test)
    assert split_dialogues(dialogues, test=60, seed=1)[1] != test


def test_dialogues_linked_through_others_stay_together() -> None:
    chain = [Dialogue(f"q{one}", f"a{two}") for one, two in [(0, 0), (1, 1), (0, 1), (2, 2)]]
    train, test = split_dialogues(chain, test=2, seed=0)
    assert {tuple(sorted(map(repr, part))) for part in (train, test)} <= {
        tuple(sorted(map(repr, chain))),
        (),
    }
    assert all(a != b for a, b in pairwise(sorted(map(repr, [*train, *test]))))
