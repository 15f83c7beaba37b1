"""Experiments' results go in, PNG pictures come out."""
