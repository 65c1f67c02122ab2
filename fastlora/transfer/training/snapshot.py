"""Everything in a run that a step changes, to be stored and put back."""

from typing import Any

from fastlora.transfer.training.average import WeightAverage
from fastlora.transfer.training.engine import Engine
from fastlora.transfer.training.progress import Progress
from fastlora.transfer.training.randomness import gathered_states, set_gathered_states


def taken(engine: Engine, average: WeightAverage, progress: Progress, accelerator: Any) -> dict[str, Any]:
    """The state of a run, in types that ``torch.load(weights_only=True)`` reads; every process has to ask."""
    return {
        "engine": engine.state(),
        "average": average.state(),
        "progress": progress.stored(),
        "generators": gathered_states(accelerator),
    }


def put_back(state: dict[str, Any], engine: Engine, average: WeightAverage, accelerator: Any) -> None:
    """Undo what changed since :func:`taken`, but for the progress: it is read before there is an engine."""
    engine.set_state(state["engine"])
    average.set_state(state["average"])
    set_gathered_states(state["generators"], accelerator)
