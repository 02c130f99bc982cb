"""Drawings of stored tables: one file per notebook, and their style."""

from ssah_utils import extras

extras.require("notebooks")  # matplotlib and seaborn are imported by all of them
