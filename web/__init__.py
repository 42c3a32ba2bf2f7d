"""The HTTP face: all that knows Flask, but for the factory."""
