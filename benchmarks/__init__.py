"""What the guard costs, as ratios: both sides interleaved in one run. `make bench` runs all of it."""
