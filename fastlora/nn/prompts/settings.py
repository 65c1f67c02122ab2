"""What learned prompts are asked to be."""

from dataclasses import dataclass
from typing import Literal, get_args

from fastlora._core.option_checks import check_count, check_flag, check_one_of, check_probability

PromptInit = Literal["auto", "uniform", "vocabulary"]


@dataclass(frozen=True)
class PromptSettings:
    """The checked hyperparameters of prompts; ``apply_prompts(model, **vars(settings))`` makes such prompts.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: ``num_tokens`` < 1, ``dropout`` outside [0, 1], ``init`` unknown.

    Example:
        >>> PromptSettings(num_tokens=50, deep=True).dropout
        0.0
    """

    num_tokens: int = 10
    deep: bool = False
    dropout: float = 0.0
    init: PromptInit = "auto"

    def __post_init__(self) -> None:
        """Check every value and turn numbers into plain ``int`` and ``float``."""
        num_tokens = check_count("num_tokens", self.num_tokens, "use 10, say")
        check_flag("deep", self.deep, "True prompts every block")
        dropout = check_probability("dropout", self.dropout)
        check_one_of("init", self.init, get_args(PromptInit), "'auto' does what the papers do")
        object.__setattr__(self, "num_tokens", num_tokens)
        object.__setattr__(self, "dropout", dropout)
