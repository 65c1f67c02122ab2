"""Other starts than A random and B zero, as functions that change an adapted model in place."""

from fastlora.init.decomposed import olora_, pissa_
from fastlora.init.eva import eva_

__all__ = ["eva_", "olora_", "pissa_"]
