// Binds View: the buffer protocol for host memory, __cuda_array_interface__ for device memory. _weights registers
// the Python type; _comm returns objects of it.
#pragma once

#include <pybind11/pybind11.h>

#include "memory/memory.hpp"

namespace pipedream {

inline void bind_view(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<View>(module, "View", py::buffer_protocol())
      .def_property_readonly("nbytes", [](const View& view) { return view.bytes; })
      .def_property_readonly("address", [](const View& view) { return reinterpret_cast<std::uintptr_t>(view.data); })
      .def_property_readonly("memory", [](const View& view) { return name_of(view.kind); })
      .def_property_readonly("__cuda_array_interface__",
                             [](const View& view) {
                               if (view.kind != MemoryKind::device) {
                                 throw py::attribute_error("host memory has no __cuda_array_interface__");
                               }
                               py::dict face;
                               face["shape"] = py::make_tuple(view.bytes);
                               face["typestr"] = "|u1";
                               face["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data), false);
                               face["version"] = 3;
                               return face;
                             })
      .def_buffer([](View& view) {
        if (view.kind == MemoryKind::device) {
          throw py::buffer_error("device memory has no buffer interface: use __cuda_array_interface__");
        }
        return py::buffer_info(reinterpret_cast<unsigned char*>(view.data), static_cast<py::ssize_t>(view.bytes));
      });
}

}  // namespace pipedream
