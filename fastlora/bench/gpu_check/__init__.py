"""``python -m fastlora.bench.gpu_check``: what a card computes and how fast, in one command of minutes.

``run`` starts each step in processes of its own (``child``), which work through items and write a line of
JSON for all that they find; it keeps that in the results file at once. ``exactness``, ``layers`` and
``training`` hold the items.
"""
