"""Rows of a run, kept and checked, and the plots that are drawn from them."""
