"""Ops: check the arguments, choose the path, run it inside an autograd Function."""
