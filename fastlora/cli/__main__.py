"""``python -m fastlora.cli``, which launchers of several processes can start."""

from fastlora.cli import main

main()
