// The trees' parts of the module fastnn._cpu.
#pragma once
#include <pybind11/pybind11.h>

void bind_tree_predict(pybind11::module_& m);
void bind_tree_exact(pybind11::module_& m);
void bind_tree_hist(pybind11::module_& m);
