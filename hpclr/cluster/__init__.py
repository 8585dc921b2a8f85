"""Runs as jobs of a cluster: submitted, watched, stopped from where the user sits."""
