"""A small trainer with a model of its own, on top of gatepack's public names."""
