"""Figures as text, pictures and a page."""
