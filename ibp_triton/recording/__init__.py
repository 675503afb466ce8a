"""A module at work as a graph: what its forward calls, on the real batch."""
