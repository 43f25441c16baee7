// The tests' module: the CUDA backend's functions over simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../python/address.h"
#include "../../python/bindings_cuda.h"
#include "../cuda/ops.h"
#include "faults.h"
#include "simt.h"

namespace py = pybind11;
using namespace sirius;

namespace {

// What the public ops pass as null: counts and offsets that a replayed graph finds in device memory.

void select_alive(Address gates, Address threshold, Address neurons, Address count, int num_rows, int intermediate, int kept,
                  Address alive, Address floats, Address counters, Address) {
  cuda::select({at<float>(gates), at<float>(threshold), at<int32_t>(neurons), num_rows, intermediate, kept}, at<int32_t>(count),
               at<int32_t>(alive), {at<float>(floats), at<int32_t>(counters)}, nullptr);
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.def("set_order", [](int order) { simt::set_order(simt::Order(order)); });  // 0 forward, 1 reverse, 2 random
  m.def("run_fault", simt::run_fault);
  bind_cuda(m);
  m.def("select_alive", select_alive);
}
