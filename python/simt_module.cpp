// The tests' module: the CUDA backend's functions over csrc/simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../csrc/simt/faults.h"
#include "../csrc/simt/simt.h"
#include "bindings_cuda.h"

PYBIND11_MODULE(_simt, m) {
  m.def("set_order", [](int order) { simt::set_order(simt::Order(order)); });  // 0 forward, 1 reverse, 2 random
  m.def("run_fault", simt::run_fault);
  bind_cuda(m);
}
