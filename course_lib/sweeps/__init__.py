"""Sweeps that take minutes, stored as small tables, and the script that makes them."""
