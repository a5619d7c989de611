"""Layers whose mathematics breaks in low precision, made to hold.

Each room is imported by its own name; nothing is imported here, so that using one layer
does not load the others.
"""
