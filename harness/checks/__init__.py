"""Checks before training, whose errors say what to do.

Options of a single callback are checked in its constructor, with ``values``; what a callback
needs of the fit is checked in its ``check`` method.
"""
