"""Where clients run: grids that carry the same messages to the same ClientApp, and the launcher of Flower's own."""
