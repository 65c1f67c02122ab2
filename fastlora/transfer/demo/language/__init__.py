"""The demo of a language model: PEFT, and the same PEFT model accelerated."""
