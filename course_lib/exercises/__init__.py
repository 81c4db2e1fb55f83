"""The exercises' checks, one module a lesson. A check never raises: it answers with a verdict."""
