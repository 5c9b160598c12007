"""Decision trees, forests and boosting on fastnn's kernels, with scikit-learn's names and parameters."""
