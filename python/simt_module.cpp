// The tests' module: the CUDA backend's functions over csrc/simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../csrc/simt/faults.h"
#include "../csrc/simt/simt.h"
#include "bindings_cuda.h"

PYBIND11_MODULE(_simt, m) {
  m.def("set_order", [](int order) { simt::set_order(simt::Order(order)); });  // 0 forward, 1 reverse, 2 random
  m.def("run_fault", simt::run_fault);
  m.def("run_mma", simt::run_mma);
  m.def("set_held", simt::set_held);
  m.def("waits_elsewhere", simt::waits_elsewhere);
  m.def("set_planning", simt::set_planning);
  // [(kernel, grid, threads, bytes of shared memory)]
  m.def("planned", [] {
    pybind11::list out;
    for (const simt::Launch& each : simt::planned())
      out.append(pybind11::make_tuple(each.kernel, pybind11::make_tuple(each.grid.x, each.grid.y, each.grid.z), each.block.x,
                                      each.shared_bytes));
    return out;
  });
  bind_cuda(m);
}
