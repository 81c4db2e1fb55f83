"""The parallel methods, by hand: each module holds what a lesson derived, cleaned up."""
