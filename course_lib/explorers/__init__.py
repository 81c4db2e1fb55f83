"""The interactive explorers: sliders above a picture, one module a lesson."""
