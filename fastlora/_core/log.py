"""Where the package tells what it decided: the logger ``fastlora``."""

import logging

logger = logging.getLogger("fastlora")
