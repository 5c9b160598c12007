"""What can run an op. ``cpu``: the kernels of this package. ``reference``: the formula in plain torch."""
