"""PEFT's LoRA layers around bitsandbytes' with the fused op in their forward; imported where there is one."""

from typing import Any

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from fastlora.interop._peft_fused import Fused


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's layer around a 4-bit one (NF4, FP4), fused."""


class FusedLinear8bitLt(Fused, Linear8bitLt):
    """PEFT's layer around one of LLM.int8, fused."""


FUSED: dict[type, Any] = {Linear4bit: FusedLinear4bit, Linear8bitLt: FusedLinear8bitLt}
