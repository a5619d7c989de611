"""Recipes: whole runs that use the house from data to report."""
