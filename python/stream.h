// Neurons that arrive from a file, as Python has them.
#pragma once

#include <cstring>

#include "../csrc/cpu/stream.h"
#include "fields.h"

template <>
struct sirius::binding::Fields<sirius::cpu::StreamImage> {
  template <class V>
  static void visit(V& v) {
    using P = sirius::cpu::StreamImage;
    v("at", &P::at);
    v("bundle", &P::bundle);
    v("nbytes", &P::nbytes);
    v("rows", &P::rows);
    v("resident", &P::resident);
  }
};

namespace sirius::binding {

// images: by layer, lists of StreamImage; checks: the address of as many uint32 as there are bundles in all of them. The others
// are StreamOptions'.
inline std::unique_ptr<cpu::Stream> make_stream(const std::string& path, int rows, const py::list& layers, size_t checks,
                                                int buffers, int slots, int readers, double patience) {
  cpu::StreamOptions options{
      .path = path, .rows = rows, .buffers = buffers, .slots = slots, .readers = readers, .patience = patience};
  const Where where{nullptr, "Stream"};
  size_t bundles = 0;
  for (const py::handle layer : layers) {
    auto& own = options.layers.emplace_back();
    for (const py::handle image : py::reinterpret_borrow<py::list>(layer)) {
      read(image.ptr(), own.emplace_back(), where);
      bundles += own.back().rows;
    }
  }
  options.checks.resize(bundles);
  std::memcpy(options.checks.data(), reinterpret_cast<const void*>(checks), options.checks.size() * sizeof(uint32_t));
  const py::gil_scoped_release unlocked;
  return std::make_unique<cpu::Stream>(std::move(options));
}

inline void bind_stream(py::module_& m) {
  using cpu::Stream;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::register_local_exception<cpu::StreamError>(m, "StreamError", PyExc_OSError);
  py::class_<Stream>(m, "Stream", py::module_local())
      .def(py::init(&make_stream), py::kw_only(), py::arg("path"), py::arg("rows"), py::arg("layers"), py::arg("checks"),
           py::arg("buffers"), py::arg("slots"), py::arg("readers"), py::arg("patience"))
      .def_property_readonly("address", [](const Stream& s) { return reinterpret_cast<size_t>(&s); })
      .def("image", [](const Stream& s, int layer, int number) { return reinterpret_cast<size_t>(s.image(layer, number)); })
      .def("places", [](const Stream& s, int layer) { return reinterpret_cast<size_t>(s.places(layer)); })
      .def("fill", &Stream::fill, Unlocked())
      .def("need", &Stream::need, Unlocked())
      .def("done", &Stream::done, Unlocked())
      .def(
          "hold", [](Stream& s, size_t neurons, int count) { s.hold(reinterpret_cast<const int32_t*>(neurons), count); },
          Unlocked())
      .def(
          "keep",
          [](Stream& s, int layer, size_t neurons, int count) {
            s.keep(layer, reinterpret_cast<const int32_t*>(neurons), count);
          },
          Unlocked())
      .def("statistics", [](const Stream& s) {
        const cpu::StreamStatistics now = s.statistics();
        return py::make_tuple(now.bytes, now.fetched, now.busy, now.waited);
      });
}

}  // namespace sirius::binding
